"""`docs/scaling.md` shows the measurements and the estimates that follow from them."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import costs, scaling

ROOT = Path(__file__).parent.parent


def test_page_shows_the_report_of_the_results_file() -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- scaling -->\n(.*)\n<!-- /scaling -->", page, re.DOTALL)
    assert shown
    assert shown[1] == costs.report(json.loads(costs.RESULTS.read_text(encoding="utf-8")))


def point(rows: int) -> dict[str, Any]:
    def stage(seconds: float, gigabytes: float) -> dict[str, float]:
        memory = {"peak_memory_bytes": gigabytes * 1e9, "anonymous_memory_bytes": gigabytes * 1e9 / 10}
        return {"seconds": seconds, **memory}

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
    "device": "2 cores of Abacus (none)",
    "curve": [
        point(100_000) | {"format": {"seconds": 99.0, "peak_memory_bytes": 9e9}},
        *map(point, (200_000, 400_000, 800_000)),
    ],
    "one_core": {"format": [[80.0, 40.0], [90.0, 50.0], [84.0, 40.0]]},
    "training": {"real_tokens": [1, 3000, 5000], "engines": {"this project, bf16": {"seconds": [99.0, 10.0, 30.0]}}},
}


def test_larger_jobs_are_estimated_from_linear_fits_to_the_parallel_points() -> None:
    lines = costs.report(RESULTS).splitlines()
    assert lines[0] == "2026-01-31, 2 cores of Abacus (none). Rows have 200 tokens on average."
    assert lines[4] == "| 100,000 | 3.5 | 0.20 | 99.0 | 9.00 | 22.0 | 0.51 |"
    assert lines[9] == (
        "For 800,000 rows, a linear fit to the points between the first and the last predicts "
        "download_dataset 21 s (measured: 21 s), format 85 s (measured: 85 s), split 162 s (measured: 162 s)."
    )
    assert lines[11] == (
        "**Estimate for 10,000,000 rows**, from a linear fit to all points but the first: "
        "download_dataset 4.2 min with 200 MB of memory; format 17 min with 1.5 GB of memory; "
        "split 33 min with 1.5 GB of memory. "
        "The tables take 4 GB."
    )
    assert lines[13] == (
        "The training split is memory-mapped. For 800,000 rows, to read and order it takes 1 s, and the process has "
        "80 MB of memory, including the libraries, besides pages that the kernel can drop. The same fit gives 1 GB for "
        "10,000,000 rows."
    )
    assert lines[15] == "Speedup of all cores over one core: format 2.00 (80 s → 40 s, 90 s → 50 s, 84 s → 40 s)."
    assert lines[19] == (
        "| 52,000 × GPT-2 | 10 M | 25 s | 41.6 MB | 4.96 GB "
        "| 2 cores of Abacus (none) | 200 | 14 h |  | measured here |"
    )
    large = [line.split(" | ") for line in lines if line.startswith("| 100,000,000 × 8B")]
    assert [line[1:9] for line in large] == [
        ["20,000 M", "9 h", "80 GB", "320 GB", "A100 80 GB", "3,172", "73 days", "9.1 days"],
        ["20,000 M", "9 h", "80 GB", "320 GB", "H100", "5,762", "40 days", "5 days"],
    ]


def test_durations_have_two_digits_in_the_largest_unit_that_gives_at_least_two() -> None:
    assert [costs.format_duration(seconds) for seconds in (0.04, 9.96, 119, 120, 7300, 172_800, 1e8)] == [
        "0.04 s",
        "10 s",
        "119 s",
        "2 min",
        "2 h",
        "2 days",
        "1,157 days",
    ]


@pytest.mark.subprocess
def test_peak_memory_is_summed_over_child_processes(tmp_path: Path) -> None:
    allocate = "import time; block = b'x' * 100_000_000; time.sleep(1)"
    child = f"subprocess.Popen([sys.executable, '-c', {allocate!r}])"
    code = f"import subprocess, sys; child = {child}; {allocate}; child.wait()"
    measured = scaling.run([sys.executable, "-c", code], tmp_path)
    assert 200e6 < measured["anonymous_memory_bytes"] < measured["peak_memory_bytes"] < 260e6
    assert measured["seconds"] > 1


@pytest.mark.subprocess
def test_data_stages_are_measured_on_generated_rows(
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
