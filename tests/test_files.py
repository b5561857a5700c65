"""Atomic writes: a file is complete or absent, and equal content gives equal bytes."""

from pathlib import Path

import pytest

from stages.data.files import atomic_path, file_sha256, write_json, write_text


def test_a_file_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as partial:
        partial.write_text("complete")
        assert not path.exists()
    assert path.read_text() == "complete"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_previous_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("partial")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_the_previous_one_completely(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    with atomic_path(path) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [entry.name for entry in path.iterdir()] == ["new"]


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial/old").touch()
    with atomic_path(tmp_path / "model", durable=True) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["model", "model/new"]


def test_json_is_readable_and_values_outside_json_are_rejected(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_text_is_utf8_in_any_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "→")
    assert (tmp_path / "a.txt").read_bytes() == b"\xe2\x86\x92"


def test_the_hash_of_several_files_is_that_of_their_concatenated_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    # The example in the standard, FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "a", tmp_path / "b") == expected
