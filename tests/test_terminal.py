"""Summaries and sizes, as a terminal and as a log show them."""

from pathlib import Path

import pytest

from stages.shared.terminal import bar, disk_use, size, summary


def test_disk_use_counts_a_file_of_two_names_once(tmp_path: Path) -> None:
    assert disk_use(tmp_path / "none") == 0
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    alone = disk_use(tmp_path)
    assert 100_000 <= alone <= 110_000
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert disk_use(tmp_path) == alone


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (4096, "4.1 kB"), (268_435_456, "268 MB"), (2_150_000_000, "2.15 GB")],
)
def test_sizes_have_three_digits(num_bytes: int, expected: str) -> None:
    assert size(num_bytes) == expected


def test_a_summary_names_what_was_written_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/raw.parquet").write_bytes(b"x" * 4096)
    summary({"rows": "3 read"}, wrote=["data/raw.parquet"], then="dvc repro")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["  rows   3 read", "  wrote  data/raw.parquet (4.1 kB)", "  next   dvc repro"]


def test_a_line_of_a_log_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    summary({"left out": "word " * 30}, wrote=[], then="dvc repro")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_data_says_is_neither_markup_nor_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    summary({"source": "[bold]a[/bold] \x1b[31mb :smile:"}, wrote=[], then="")
    assert capsys.readouterr().out.splitlines()[0].strip() == r"source  [bold]a[/bold] \x1b[31mb :smile:"


def test_a_bar_gives_the_items_and_says_nothing_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(bar(iter("abc"), "read", "row")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
