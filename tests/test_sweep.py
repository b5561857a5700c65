"""A sweep as `docs/sweeps.md` has it: a grid in the queue, two real workers, the winner kept."""

import csv
import io
import re
from pathlib import Path

import psutil
import pytest

from tests.clone import ROOT, commit, copy_clone, run, stages_run

PAGE = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
GRID = ("-S", "learning_rate=1e-3,2e-3", "-S", "weight_decay=0.0,0.1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, ran: Path) -> Path:
    """A clone in which the pipeline ran and then a sweep of four, on one worker for each of two devices."""
    clone = copy_clone(ran, tmp_path_factory.mktemp("sweep") / "clone")
    commit(clone, "results")
    run(clone, "dvc", "exp", "run", "--queue", *GRID)
    # Into a file: a worker keeps the output of its starter open, and a pipe would be waited for as long as it works.
    run(clone, "bash", "-c", "dvc queue start &> .dvc/tmp/workers", CUDA_VISIBLE_DEVICES="0")
    run(clone, "bash", "-c", "dvc queue start --jobs 2 &>> .dvc/tmp/workers", CUDA_VISIBLE_DEVICES="1")
    devices: set[str] = set()
    status = "Queued"
    while re.search("Queued|Running", status):
        devices |= worker_devices(clone)
        status = run(clone, "dvc", "queue", "status").stdout
    (clone / "devices").write_text(" ".join(sorted(devices)))
    run(clone, "dvc", "queue", "stop")
    assert status.count("Success") == 4, status
    return clone


def worker_devices(clone: Path) -> set[str]:
    """CUDA_VISIBLE_DEVICES of each queue worker of this clone that runs now."""
    workers = [
        process.info["environ"]
        for process in psutil.process_iter(["cmdline", "cwd", "environ"])
        if "queue-worker" in (process.info["cmdline"] or []) and process.info["cwd"] == str(clone.resolve())
    ]
    return {environment["CUDA_VISIBLE_DEVICES"] for environment in workers if environment}


def experiments(clone: Path) -> list[dict[str, str]]:
    shown = run(clone, "dvc", "exp", "show", "--csv", "--only-changed").stdout
    return [row for row in csv.DictReader(io.StringIO(shown)) if row["rev"] not in ("workspace", "main")]


def test_a_grid_is_run_by_real_workers(swept: Path) -> None:
    found = {(row["learning_rate"], row["weight_decay"]) for row in experiments(swept)}
    assert found == {("0.001", "0.0"), ("0.001", "0.1"), ("0.002", "0.0"), ("0.002", "0.1")}
    losses = {row["metrics/evaluate/tuned.json:loss"] for row in experiments(swept)}
    assert len(losses) == 4


def test_a_worker_has_the_device_that_it_was_started_with(swept: Path) -> None:
    assert (swept / "devices").read_text() == "0 1"


def test_the_table_of_the_page_fits_into_100_columns(swept: Path) -> None:
    (command,) = (line for line in PAGE.splitlines() if line.startswith("dvc exp show --drop"))
    shown = run(swept, "bash", "-c", command, COLUMNS="100").stdout.splitlines()
    assert shown[1].split() == ["Experiment", "validation_loss", "best_step", "learning_rate", "weight_decay"]
    assert len(shown) == 4 + 6  # lines, header, the workspace, main and four experiments
    assert "…" not in "".join(shown)


def test_the_winner_is_reviewed_applied_and_made_a_branch(swept: Path) -> None:
    best = min(experiments(swept), key=lambda row: float(row["validation_loss"]))
    reviewed = run(swept, "python", "-m", "review", "main", best["Experiment"], check=False, PYTHONPATH=str(ROOT))
    assert "Test loss:" in reviewed.stdout
    run(swept, "dvc", "exp", "branch", best["Experiment"], "winner")
    assert f"learning_rate: {best['learning_rate']}" in run(swept, "git", "show", "winner:params.yaml").stdout
    run(swept, "dvc", "exp", "apply", best["Experiment"])
    assert stages_run(run(swept, "dvc", "repro")) == []
    assert "params.yaml" in run(swept, "git", "status", "--porcelain").stdout


def test_the_tables_of_the_page_are_those_of_its_sweep() -> None:
    with (ROOT / "docs/sweep.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Experiment"]]
    expected = [
        f"| {float(row['learning_rate']):.0e} | {row['weight_decay']} | {float(row['validation_loss']):.4f} "
        f"| {float(row['metrics/evaluate/tuned.json:loss']):.4f} "
        f"| {float(row['metrics/evaluate/tuned.json:stop_rate']):.2f} |"
        for row in rows
    ]
    assert PAGE.split("<!-- sweep -->\n")[1].split("\n<!-- /sweep -->")[0].splitlines()[2:] == expected


@pytest.mark.parametrize("name", ["better", "worse", "within-noise"])
def test_the_verdicts_of_the_page_are_those_of_its_reviews(name: str) -> None:
    headline = (ROOT / f"docs/reviews/{name}.md").read_text(encoding="utf-8").splitlines()[2]
    found = re.fullmatch(r"\*\*Test loss: (?:. )?(.+), (.+ → .+), .+ nats a token, 95 % interval (.+)\.\*\*", headline)
    assert found
    words, losses, interval = found.groups()
    assert words == name.replace("-", " ")
    assert f"| {losses} | {interval} | [{words}](reviews/{name}.md) |" in PAGE
