"""The predictions of a revision: one table for each training run, of `train` and of the replicates."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import pandas as pd

from review.rescoring import Rescoring
from review.revisions import Revision, hashes, output_hashes

PREDICTIONS, METRICS_FILE = "data/predictions/tuned.parquet", "metrics/evaluate/tuned.json"
REPLICATE = "data/predictions/replicates/{seed}.parquet"
OLDER_PREDICTIONS = {"split": "test", "num_answers": 1}  # the values of columns that they do not have
RESULTS = ("seed", "models/tuned", "data/answers/")  # inputs of a run's stages in which runs differ


@dataclass(frozen=True)
class RevisionRuns:
    """The runs of a revision.

    paths: where the predictions of each run are, by seed; the run of `train` is the first.
    hashes: the MD5 of each run's predictions in `dvc.lock`, by seed.
    tables: the predictions that are available, by seed; all have the same examples.
    notes: why runs were left out.
    """

    paths: dict[int, str] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    tables: dict[int, pd.DataFrame] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of_split(self, split: str) -> "RevisionRuns":
        """The same runs with the predictions of one split, which have example ids as index."""
        parts = {seed: table[table["split"] == split] for seed, table in self.tables.items()}
        return replace(self, tables={seed: part.set_index("example_id") for seed, part in parts.items() if len(part)})


def find_runs(revision: Revision) -> RevisionRuns:
    """The runs that `params.yaml` and `dvc.lock` describe. Their tables are not read yet.

    A replicate counts only if it had the same inputs and parameters as the model; otherwise it is a run of another
    configuration, left from before a change.
    """
    params, lock = revision.read_yaml("params.yaml"), revision.read_yaml("dvc.lock")
    stages, outputs = lock.get("stages") or {}, output_hashes(lock)
    train, *scoring = (stages.get(name, {}) for name in ("train", "predict@tuned", "evaluate@tuned"))
    expected = _inputs(train, *scoring)
    paths: dict[int, str] = {}
    notes = []
    seed = _params(train).get("seed", params.get("seed"))  # params.yaml may have changed since the training
    if outdated := find_outdated(train, *scoring):
        notes.append(f"{revision.name}: {outdated} changed after it was scored; `dvc repro` scores it again.")
    else:
        paths[seed if isinstance(seed, int) else 0] = PREDICTIONS
    seeds = params.get("replicate_seeds") or []
    for seed in seeds if isinstance(seeds, list) else [seeds]:
        replicate, evaluate = (stages.get(f"{name}@{seed}", {}) for name in ("replicate", "evaluate_replicate"))
        inputs = _inputs(replicate, evaluate)
        differing = sorted(name for name in inputs.keys() & expected.keys() if inputs[name] != expected[name])
        if not isinstance(seed, int):
            problem = f"replicate_seeds contains {seed!r}, which is not a seed."
        elif seed in paths:
            problem = f"seed {seed} occurs twice in seed and replicate_seeds; it counts once."
        elif not replicate:
            problem = f"the replicate of seed {seed} has not run; `dvc repro` runs it."
        elif outdated := find_outdated(replicate, evaluate):
            problem = f"{outdated} changed after it was scored; `dvc repro` scores it again."
        elif differing:
            problem = f"the replicate of seed {seed} is not used, because it had other inputs than the model "
            problem += f"({', '.join(differing)}); `dvc repro` runs it again."
        else:
            paths[seed] = REPLICATE.format(seed=seed)
            continue
        notes.append(f"{revision.name}: {problem}")
    return RevisionRuns(paths, {seed: outputs.get(path, "") for seed, path in paths.items()}, notes=notes)


def find_outdated(*stages: Mapping[str, Any]) -> str | None:
    """The output of one of these stages that changed after a later one had used it; None if there is none."""
    for earlier, later in combinations(stages, 2):
        outs, deps = hashes(earlier.get("outs", [])), hashes(later.get("deps", []))
        for path, md5 in outs.items():
            if deps.get(path, md5) != md5:
                return path
    return None


def read_runs(revision: Revision, runs: RevisionRuns, rescoring: Rescoring) -> None:
    """Read the tables, and score them again if necessary. Those with other examples than the first are left out."""
    for seed, path in runs.paths.items():
        table = read_predictions(revision, path)
        if table is None:  # the report lists missing files
            continue
        problem = find_problem(table)
        if not problem and runs.tables and example_keys(table) != example_keys(next(iter(runs.tables.values()))):
            problem = "it has other examples than the first run"
        if problem:
            runs.notes.append(f"{revision.name}: {path} is not used, because {problem}; `dvc repro` writes it again.")
        else:
            runs.tables[seed] = rescoring.apply(revision, path, table)


def metrics_of_split(metrics: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    """The metrics of a split in a metrics file; those of the test split are not nested."""
    return metrics if split == "test" else metrics.get(split, {})


def read_answers(revision: Revision, rescoring: Rescoring) -> dict[str, dict[str, Any]]:
    """The predictions of the run of `train` on the test split, by example id; empty if they are not available."""
    table = read_predictions(revision, PREDICTIONS)
    if table is None or find_problem(table):
        return {}
    rows = rescoring.apply(revision, PREDICTIONS, table).to_dict("records")
    return {row["example_id"]: row for row in rows if row["split"] == "test"}


def read_predictions(revision: Revision, path: str) -> pd.DataFrame | None:
    """The predictions with the columns that those of older revisions lack. They have no checks, so none is passed."""
    table = revision.read_table(path)
    if table is None:
        return None
    return table.assign(**{name: value for name, value in OLDER_PREDICTIONS.items() if name not in table})


def example_keys(table: pd.DataFrame) -> set[tuple[str, str]]:
    return {*zip(table["split"], table["example_id"], strict=True)}


def find_problem(table: pd.DataFrame) -> str | None:
    """Why a table can't be predictions; None if it can."""
    if "example_id" not in table:
        return "it has no column example_id"
    if table["example_id"].isna().any() or table.duplicated(["split", "example_id"]).any():
        return "it has an example twice or without an id"
    return None if len(table) else "it has no examples"


def _inputs(*stages: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes and parameters on which stages depend, except the results of a run: its model and its answers."""
    inputs: dict[str, Any] = {}
    for stage in stages:
        inputs |= _params(stage) | hashes(stage.get("deps", []))
    return {name: value for name, value in inputs.items() if not name.startswith(RESULTS)}


def _params(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for values in stage.get("params", {}).values() for name, value in values.items()}
