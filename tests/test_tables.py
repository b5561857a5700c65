"""Parquet tables: equal rows give equal bytes, and a table is complete or absent."""

from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data import tables
from stages.data.files import file_sha256
from stages.data.tables import parquet_writer, read_batches, read_table, shards

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64())])


def test_parquet_bytes_do_not_depend_on_how_the_rows_are_batched(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "number": i} for i in range(10_000)]
    with parquet_writer(tmp_path / "one_batch.parquet", SCHEMA) as writer:
        writer.write(rows)
    with parquet_writer(tmp_path / "many_batches.parquet", SCHEMA) as writer:
        for row in rows[:500]:
            writer.write([row])
        writer.write(pa.Table.from_pylist(rows[500:], SCHEMA))
    assert (tmp_path / "one_batch.parquet").read_bytes() == (tmp_path / "many_batches.parquet").read_bytes()
    assert pq.ParquetFile(tmp_path / "one_batch.parquet").num_row_groups == 3
    assert [len(batch) for batch in read_batches(tmp_path / "one_batch.parquet")] == [4096, 4096, 1808]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 4)
    monkeypatch.setattr(tables, "ROWS_PER_SHARD", 8)


def test_a_table_of_several_shards_is_a_folder_of_shards_with_a_fixed_size(tmp_path: Path, small_shards: None) -> None:
    rows = [{"text": f"row {i}", "number": i} for i in range(21)]
    for name in ("one_batch", "many_batches"):
        with parquet_writer(tmp_path / name, SCHEMA) as writer:
            for part in [rows] if name == "one_batch" else [rows[:3], rows[3:20], rows[20:]]:
                writer.write(part)
    written = shards(tmp_path / "one_batch")
    assert [path.name for path in written] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert [pq.read_metadata(path).num_rows for path in written] == [8, 8, 5]
    assert [path.read_bytes() for path in shards(tmp_path / "many_batches")] == [path.read_bytes() for path in written]
    assert [len(batch) for batch in read_batches(tmp_path / "one_batch")] == [4, 4, 4, 4, 4, 1]
    assert read_table(tmp_path / "one_batch", ["number"])["number"].to_pylist() == list(range(21))
    assert file_sha256(*written) == sha256(b"".join(path.read_bytes() for path in written)).hexdigest()


def test_a_table_of_one_shard_is_one_file_and_replaces_a_file_or_folder(tmp_path: Path, small_shards: None) -> None:
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


@settings(max_examples=50)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20))
def test_any_unicode_text_is_read_back_unchanged(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    rows = [{"text": text, "number": i} for i, text in enumerate(texts)]
    with parquet_writer(path, SCHEMA) as writer:
        writer.write(rows)
    assert [row for batch in read_batches(path) for row in batch.to_pylist()] == rows
