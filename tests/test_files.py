"""Files appear whole or not at all, with the same bytes for the same content."""

from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.shared import files
from stages.shared.files import (
    atomic_path,
    parquet_writer,
    read_batches,
    read_table,
    shards,
    table_sha256,
    write_json,
    write_text,
)

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64())])


def test_a_file_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_the_one_before_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    with atomic_path(path) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [entry.name for entry in path.iterdir()] == ["new"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial/old").touch()
    with atomic_path(tmp_path / "model", durable=True) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["model", "model/new"]


def test_json_is_readable_and_refuses_what_json_can_not_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "→")
    assert (tmp_path / "a.txt").read_bytes() == b"\xe2\x86\x92"


def test_parquet_bytes_do_not_depend_on_how_the_rows_came(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "number": i} for i in range(10_000)]
    with parquet_writer(tmp_path / "at_once.parquet", SCHEMA) as writer:
        writer.write(rows)
    with parquet_writer(tmp_path / "in_parts.parquet", SCHEMA) as writer:
        for row in rows[:5000]:
            writer.write([row])
        writer.write(pa.Table.from_pylist(rows[5000:], SCHEMA))
    assert (tmp_path / "at_once.parquet").read_bytes() == (tmp_path / "in_parts.parquet").read_bytes()
    assert pq.ParquetFile(tmp_path / "at_once.parquet").num_row_groups == 3
    assert [len(batch) for batch in read_batches(tmp_path / "at_once.parquet")] == [4096, 4096, 1808]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROWS_PER_GROUP", 4)
    monkeypatch.setattr(files, "ROWS_PER_SHARD", 8)


def test_a_table_of_more_than_one_shard_is_a_folder_of_shards_of_fixed_size(tmp_path: Path, small_shards: None) -> None:
    rows = [{"text": f"row {i}", "number": i} for i in range(21)]
    for name in ("at_once", "in_parts"):
        with parquet_writer(tmp_path / name, SCHEMA) as writer:
            for part in [rows] if name == "at_once" else [rows[:3], rows[3:20], rows[20:]]:
                writer.write(part)
    written = shards(tmp_path / "at_once")
    assert [path.name for path in written] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert [pq.read_metadata(path).num_rows for path in written] == [8, 8, 5]
    assert [path.read_bytes() for path in shards(tmp_path / "in_parts")] == [path.read_bytes() for path in written]
    assert [len(batch) for batch in read_batches(tmp_path / "at_once")] == [4, 4, 4, 4, 4, 1]
    assert read_table(tmp_path / "at_once", ["number"])["number"].to_pylist() == list(range(21))
    assert table_sha256(tmp_path / "at_once") == sha256(b"".join(path.read_bytes() for path in written)).hexdigest()


def test_a_table_of_one_shard_is_one_file_whatever_was_there(tmp_path: Path, small_shards: None) -> None:
    for num_rows in (8, 9, 8, 0):
        with parquet_writer(tmp_path / "a.parquet", SCHEMA) as writer:
            writer.write([{"text": "a", "number": i} for i in range(num_rows)])
        assert (tmp_path / "a.parquet").is_dir() == (num_rows == 9)
        assert sum(map(len, read_batches(tmp_path / "a.parquet"))) == num_rows
        assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_parquet_file_without_rows_has_its_schema(tmp_path: Path) -> None:
    with parquet_writer(tmp_path / "a.parquet", SCHEMA):
        pass
    assert pq.read_schema(tmp_path / "a.parquet") == SCHEMA
    assert list(read_batches(tmp_path / "a.parquet")) == []


def test_a_failure_leaves_no_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), parquet_writer(tmp_path / "a.parquet", SCHEMA) as writer:
        writer.write([{"text": "a", "number": 1}])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20))
def test_any_unicode_comes_back_from_parquet(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    rows = [{"text": text, "number": i} for i, text in enumerate(texts)]
    with parquet_writer(path, SCHEMA) as writer:
        writer.write(rows)
    assert [row for batch in read_batches(path) for row in batch.to_pylist()] == rows
