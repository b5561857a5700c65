"""Results of lm-evaluation-harness (`make lm-eval`): one value per task, metric and example, compared in pairs.

Each task is judged on its own examples. p-values are corrected for the number of all tasks and metrics.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd

from review.revisions import Revision, output_hashes
from review.runs import RevisionRuns
from review.verdicts import Results, compare_runs, judge
from stages.runtime.errors import user_errors
from stages.scoring.metrics import column_metric

SAMPLES = "metrics/lm_eval/{model}.jsonl"


@dataclass(frozen=True)
class Samples:
    """The results of one model.

    model: the MD5 of its folder in `dvc.lock`.
    directions: for each task and metric, 1 if higher is better, or −1.
    table: a column for each task and metric, with missing values for the examples of other tasks; example ids as index.
    """

    model: str
    directions: dict[str, int]
    table: pd.DataFrame


def write_samples(samples: Samples, settings: Mapping[str, Any]) -> str:
    """The content of the file: a line about the model and the harness, then a line per example."""
    header = {"model": samples.model, "directions": samples.directions, **settings}
    rows = (
        {"example_id": example_id} | {name: value for name, value in row.items() if pd.notna(value)}
        for example_id, row in zip(samples.table.index, samples.table.to_dict("records"), strict=True)
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *rows))


def read_samples(revision: Revision, model: str) -> Samples | None:
    """The results of a model of a revision; None if there are none."""
    path = SAMPLES.format(model=model)
    if (content := revision.read(path)) is None:
        return None
    with user_errors(f"{path} of {revision.name}", "run `make lm-eval` again"):
        header, *rows = map(json.loads, content.decode().splitlines())
        table = pd.DataFrame(rows).set_index("example_id")
        return Samples(header["model"], header["directions"], table)


def compare_harness(before: Revision, after: Revision) -> Results | None:
    """Compare the tuned models of two revisions; None if one of them has no results.

    Results of another model than the one in `dvc.lock` are not used.
    """
    first, second = read_samples(before, "tuned"), read_samples(after, "tuned")
    if first is None or second is None:
        return None
    notes = []
    for revision, samples in ((before, first), (after, second)):
        if samples.model != output_hashes(revision.read_yaml("dvc.lock")).get("models/tuned"):
            notes.append(f"{revision.name}: {SAMPLES.format(model='tuned')} is of another model; run `make lm-eval`.")
    return Results([], notes, []) if notes else compare_samples(first, second, (before.name, after.name))


def compare_samples(before: Samples, after: Samples, names: tuple[str, str]) -> Results:
    """Compare the tasks and metrics that both models have, on their common examples."""
    common = [name for name in after.directions if name in before.directions]
    if not common:
        return Results([], [f"{names[0]} and {names[1]} have run no common task of lm-evaluation-harness."], [])
    old_tasks, new_tasks = ({task_of(metric) for metric in samples.directions} for samples in (before, after))
    notes = []
    for name, only in ((names[0], old_tasks - new_tasks), (names[1], new_tasks - old_tasks)):
        if only:
            notes.append(f"Only {name} has run {', '.join(sorted(only))}.")
    metrics = []
    for task, group in groupby(common, task_of):
        columns = [column_metric(name, after.directions[name], name) for name in group]
        names_of_task = [column.name for column in columns]
        old, new = (samples.table.reindex(columns=names_of_task).dropna(how="all") for samples in (before, after))
        results = compare_runs(RevisionRuns(tables={0: old}), RevisionRuns(tables={0: new}), names, {}, task, columns)
        metrics += results.metrics
        notes += results.notes
    return Results(judge(metrics, {}), notes, [])


def task_of(name: str) -> str:
    """The task in the name of a task and metric, such as `arc_easy: acc`."""
    return name.partition(":")[0]
