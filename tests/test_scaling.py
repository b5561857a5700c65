"""The page on scaling says what was measured, and what follows from it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import costs, scaling

ROOT = Path(__file__).parent.parent


def test_the_page_shows_what_the_file_says() -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- scaling -->\n(.*)\n<!-- /scaling -->", page, re.DOTALL)
    assert shown
    assert shown[1] == costs.report(json.loads(costs.RESULTS.read_text(encoding="utf-8")))


def point(rows: int) -> dict[str, Any]:
    def stage(seconds: float, gigabytes: float) -> dict[str, float]:
        return {"seconds": seconds, "peak_memory_bytes": gigabytes * 1e9}

    return {
        "rows": rows,
        "tokens": 200 * rows,
        "bytes": {"raw": 100 * rows, "train": 300 * rows},
        "download_dataset": stage(1 + rows / 40_000, 0.2),
        "format": stage(5 + rows / 10_000, 1.5),
        "split": stage(2 + rows / 5_000, 0.5 + rows / 1e7),
        "read_train": stage(1, rows / 1e6),
    }


RESULTS = {
    "date": "2026-01-31",
    "processor": "Abacus (none)",
    "cores": 2,
    "curve": [
        point(100_000) | {"format": {"seconds": 99.0, "peak_memory_bytes": 9e9}},
        *map(point, (200_000, 400_000, 800_000)),
    ],
    "one_core": {"format": [[80.0, 40.0], [90.0, 50.0], [84.0, 40.0]]},
    "training": {"real_tokens": [1, 3000, 5000], "engines": {"this project, bf16": {"seconds": [99.0, 10.0, 30.0]}}},
}


def test_larger_jobs_follow_from_lines_through_the_points_of_several_processes() -> None:
    lines = costs.report(RESULTS).splitlines()
    assert lines[0] == "2026-01-31, 2 cores of Abacus (none). Rows of 200 tokens in the mean."
    assert lines[4] == "| 100,000 | 3.5 | 0.20 | 99.0 | 9.00 | 22.0 | 0.51 |"
    assert lines[9] == (
        "A straight line through the points between foretells the seconds of 800,000 rows: "
        "download_dataset 21 (measured 21), format 85 (measured 85), split 162 (measured 162)."
    )
    assert lines[11] == (
        "**10,000,000 rows, estimated** by a line through all points but the first: "
        "download_dataset 4.2 min, 200 MB of memory; format 17 min, 1.5 GB of memory; split 33 min, 1.5 GB of memory. "
        "The tables take 4 GB. Training would read its split into 10 GB of memory."
    )
    assert lines[13] == "One core against all, format: 2.00 times (80 s and 40 s, 90 s and 50 s, 84 s and 40 s)."
    assert lines[17] == (
        "| 52,000 × GPT-2 | 10 M | 25 s | 41.6 MB | 4.96 GB "
        "| 2 cores of Abacus (none) | 200 | 14 h |  | measured here |"
    )
    large = [line.split(" | ") for line in lines if line.startswith("| 100,000,000 × 8B")]
    assert [line[1:9] for line in large] == [
        ["20,000 M", "9 h", "80 GB", "320 GB", "A100 80 GB", "3,172", "73 days", "9.1 days"],
        ["20,000 M", "9 h", "80 GB", "320 GB", "H100", "5,762", "40 days", "5 days"],
    ]


def test_durations_have_two_digits_in_the_largest_unit_that_fits() -> None:
    assert [costs.duration(seconds) for seconds in (0.04, 9.96, 119, 120, 7300, 172_800, 1e8)] == [
        "0.04 s",
        "10 s",
        "119 s",
        "2 min",
        "2 h",
        "2 days",
        "1,157 days",
    ]


def test_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    hold = "import time; block = b'x' * 100_000_000; time.sleep(1)"
    code = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; child.wait()"
    measured = scaling.run([sys.executable, "-c", code], tmp_path)
    assert 200e6 < measured["peak_memory_bytes"] < 260e6
    assert measured["seconds"] > 1


def test_the_data_stages_are_measured_from_the_shipped_rows(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    monkeypatch.setattr(scaling, "ROWS", [60])
    (measured,) = scaling.curve()
    assert measured["rows"] == measured["split"]["rows_in"] == 60
    assert measured["split"]["train"] > 30
    assert set(measured["bytes"]) == {"raw", "formatted", "train", "validation", "test"}
    assert min(measured["bytes"].values()) > 0
    assert measured["tokens"] > 60 * 100
    for stage in ("download_dataset", "format", "split", "read_train"):
        assert measured[stage]["seconds"] > 0
        assert measured[stage]["peak_memory_bytes"] > 30e6
