"""The job array of docs/sweeps.md: the script of the page in several processes at the same time, without Slurm."""

import io
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from review.comparison import Comparison
from review.revisions import Revision
from tests.clone import ROOT, copy_clone, environment, run

pytestmark = pytest.mark.subprocess

PAGE = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
(SCRIPT,) = (text for text in BLOCKS if text.startswith("#!/bin/bash"))
(COLLECT,) = (text for text in BLOCKS if text.startswith("dvc exp pull --no-cache origin\n"))
POINTS = {"lr-1e-4-wd-0.01": (1e-4, 0.01), "lr-2e-4-wd-0.1": (2e-4, 0.1)}  # of tasks 0 and 3


def submit(project: Path, script: str, *numbers: int) -> list[str]:
    """Run these tasks of the array at the same time, as `sbatch` does in the folder of the project; their output."""
    file = project.parent / "sweep.sh"
    file.write_text(script.replace("/mnt/team", str(project.parent)))
    base = run(project, "git", "rev-parse", "HEAD").stdout.strip()
    tasks = [
        subprocess.Popen(
            ["bash", file, base],
            cwd=project,
            env=environment(SLURM_ARRAY_TASK_ID=str(number)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in numbers
    ]
    outputs = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * len(tasks), "\n".join(outputs)
    return outputs


def test_tasks_that_run_at_the_same_time_share_the_cache_and_their_points_are_collected(
    tmp_path: Path, ran: Path, fast_stages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clone with committed results, which a bare git repository has; its cache is outside of it.
    project = copy_clone(ran, tmp_path / "project")
    run(tmp_path, "git", "init", "-q", "--bare", "-b", "main", "origin.git")
    run(project, "git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    (project / ".dvc/cache").rename(tmp_path / "cache")
    run(project, "bash", "-ec", f"dvc cache dir --local {tmp_path}/cache; dvc config --local cache.shared group")
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/activate").touch()  # the programs of the tests stay first on the path
    run(project, "git", "push", "-q", "origin", "main")

    outputs = submit(project, SCRIPT, 0, 3)
    for output in outputs:
        stages = set(re.findall(r"^Running stage '(.+)':", output, re.MULTILINE))
        # check_params runs after any change of params.yaml.
        assert stages - {"check_params"} == {"train", "predict@tuned", "evaluate@tuned", "generate@tuned"}

    pull, show, review = COLLECT.splitlines()
    run(project, "bash", "-ec", pull)
    table = run(project, "bash", "-ec", f"{show} --csv --hide-workspace").stdout
    shown = pd.read_csv(io.StringIO(table)).dropna(subset="Experiment").set_index("Experiment")
    assert {name: (row["learning_rate"], row["weight_decay"]) for name, row in shown.iterrows()} == POINTS
    assert shown["metrics/evaluate/tuned.json:loss"].nunique() == 2

    assert review == "make review BASE=main REV=lr-2e-4-wd-0.1"
    monkeypatch.chdir(project)
    comparison = Comparison(Revision("main"), Revision("lr-2e-4-wd-0.1"))
    assert comparison.test.metrics[0].difference  # so the predictions of both are in the shared cache

    (output,) = submit(project, SCRIPT, 0)  # a finished task that is submitted again
    assert "Running stage" not in output
    assert "lr-1e-4-wd-0.01 is up to date on Git remote" in output
