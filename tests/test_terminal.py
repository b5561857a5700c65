"""Summaries, sizes and progress bars, on a terminal and in a log."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.terminal import disk_usage, format_bytes, progress, summary
from tests.clone import ROOT


def test_disk_usage_counts_hard_links_once(tmp_path: Path) -> None:
    assert disk_usage(tmp_path / "none") == 0
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    alone = disk_usage(tmp_path)
    assert 100_000 <= alone <= 110_000
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert disk_usage(tmp_path) == alone


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (4096, "4.1 kB"), (268_435_456, "268 MB"), (2_150_000_000, "2.15 GB")],
)
def test_sizes_have_three_significant_digits(num_bytes: int, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


def test_summary_lists_results_written_files_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/raw.parquet").write_bytes(b"x" * 4096)
    summary({"rows": "3 read"}, wrote=["data/raw.parquet"], then="dvc repro")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["  rows   3 read", "  wrote  data/raw.parquet (4.1 kB)", "  next   dvc repro"]


def test_summary_in_a_log_has_long_lines_and_neither_markup_nor_terminal_control(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary({"source": "[bold]a[/bold] \x1b[31mb :smile:", "rejected": "word " * 30}, wrote=[], then="")
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.strip() == r"source    [bold]a[/bold] \x1b[31mb :smile:"
    assert second.strip() == "rejected  " + ("word " * 30).strip()


def test_progress_yields_the_items_and_prints_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter("abc"), "read", "row")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


@pytest.mark.subprocess
def test_progress_starts_no_thread() -> None:
    """A signal that came while tqdm started its monitor was lost, and the stage ran on."""
    code = "import threading; from stages.runtime.terminal import progress\n[*progress([1, 2], 'd', 'u')]"
    code += "; print(threading.active_count())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"
