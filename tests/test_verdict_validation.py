"""The simulation of `make verdicts`, and what it published."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import verdicts
from review.statistics import compare
from tests.clone import copy_clone, environment


@pytest.mark.parametrize(("design", "seeds"), [("same seeds", {0, 1, 2}), ("other seeds", set())])
def test_simulated_reviews_have_the_true_difference_on_average(design: str, seeds: set[int]) -> None:
    random = np.random.default_rng(0)
    found = [
        compare(*verdicts.simulated_review(random, design, 3, 50, true=0.04), np.arange(50)).value for _ in range(60)
    ]
    assert np.mean(found) == pytest.approx(0.04, abs=0.007)
    before, after = verdicts.simulated_review(random, design, 3, 50, true=0.04)
    assert set(before.seeds) & set(after.seeds) == seeds


@pytest.mark.subprocess
@pytest.mark.usefixtures("fast_stages")
def test_an_experiment_is_run_once(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = copy_clone(ran, tmp_path / "clone")
    monkeypatch.chdir(clone)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    first = verdicts.run_experiment("noise", ["replicate_seeds=[1]"])
    assert list(first) == [42, 1]
    again = verdicts.run_experiment("noise", ["replicate_seeds=[1]"])  # an experiment of this name would be an error
    assert again[1].equals(first[1])


def test_the_published_intervals_cover_the_truth_and_real_runs_of_other_seeds_do_not_differ() -> None:
    results = json.loads(verdicts.RESULTS.read_text(encoding="utf-8"))
    assert len(results["simulation"]) == 36
    assert min(cell["coverage"] for cell in results["simulation"]) >= 0.94
    false_alarms = [cell["significant"]["0"] for cell in results["simulation"]]
    assert np.mean(false_alarms) <= 0.05
    assert len(results["test_losses"]) == 6
    assert max(change["paired"] for change in results["changes"].values()) < np.std([*results["test_losses"].values()])
    assert results["pairs"]["number"] == 15
    assert results["pairs"]["different"]["with replicates"] == {"loss": 0, "any metric": 0}
