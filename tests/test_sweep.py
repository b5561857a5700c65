"""A sweep as in docs/sweeps.md: a grid in the queue, two real workers, the winner is kept."""

import io
import re
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.clone import ROOT, copy_clone, run, stages_run

pytestmark = pytest.mark.subprocess

PAGE = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
GRID = ("-S", "learning_rate=2e-3", "-S", "weight_decay=0.0,0.1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, ran: Path, fast_stages: None) -> Path:
    """A clone in which the pipeline and a sweep of two experiments ran, with one worker for each of two devices."""
    clone = copy_clone(ran, tmp_path_factory.mktemp("sweep") / "clone")
    run(clone, "dvc", "exp", "run", "--queue", *GRID)
    run(clone, "dvc", "queue", "start", CUDA_VISIBLE_DEVICES="0")
    run(clone, "dvc", "queue", "start", "--jobs", "2", CUDA_VISIBLE_DEVICES="1")
    devices: set[str] = set()
    status = "Queued"
    while re.search("Queued|Running", status):
        devices |= worker_devices(clone)
        time.sleep(1)  # `dvc queue status` would take a core from the workers
        # It fails if it reads a file while a worker writes it, after it has listed the experiments.
        status = run(clone, "dvc", "queue", "status", check=False).stdout
    (clone / "devices").write_text(" ".join(sorted(devices)))
    run(clone, "dvc", "queue", "stop")
    assert status.count("Success") == 2, status
    return clone


def worker_devices(clone: Path) -> set[str]:
    """CUDA_VISIBLE_DEVICES of each running queue worker of this clone."""
    workers = [
        process.info["environ"]
        for process in psutil.process_iter(["cmdline", "cwd", "environ"])
        if "queue-worker" in (process.info["cmdline"] or []) and process.info["cwd"] == str(clone.resolve())
    ]
    return {environment["CUDA_VISIBLE_DEVICES"] for environment in workers if environment}


@pytest.fixture(scope="module")
def experiments(swept: Path) -> pd.DataFrame:
    shown = pd.read_csv(io.StringIO(run(swept, "dvc", "exp", "show", "--csv", "--only-changed").stdout))
    return shown[~shown["rev"].isin(["workspace", "main"])]


def test_a_grid_is_run_by_real_workers_which_keep_the_device_of_their_environment(
    swept: Path, experiments: pd.DataFrame
) -> None:
    assert set(experiments["weight_decay"]) == {0.0, 0.1}
    assert experiments["metrics/evaluate/tuned.json:loss"].nunique() == 2
    assert (swept / "devices").read_text() == "0 1"
    # Checkpoints of the copies are in the project, so a killed experiment resumes (test_pipeline.py).
    assert list(swept.glob(".scratch/train/*/finished"))


def test_the_command_of_the_page_fits_into_100_columns(swept: Path) -> None:
    (command,) = (line for line in PAGE.splitlines() if line.startswith("dvc exp show --drop"))
    shown = run(swept, "bash", "-c", command, COLUMNS="100").stdout.splitlines()
    assert shown[1].split() == ["Experiment", "validation_loss", "best_step", "learning_rate", "weight_decay"]
    assert len(shown) == 4 + 4  # lines and header; the workspace, main and two experiments
    assert "…" not in "".join(shown)


def test_the_winner_is_branched_and_applied(swept: Path, experiments: pd.DataFrame) -> None:
    best = experiments.sort_values("validation_loss").iloc[0]
    run(swept, "dvc", "exp", "branch", best["Experiment"], "winner")
    assert "learning_rate: 0.002" in run(swept, "git", "show", "winner:params.yaml").stdout
    run(swept, "dvc", "exp", "apply", best["Experiment"])
    assert stages_run(run(swept, "dvc", "repro")) == []
    assert "params.yaml" in run(swept, "git", "status", "--porcelain").stdout
