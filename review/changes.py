"""What changed between two revisions: parameters, stages, metrics, sample answers and test examples."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from dvc.utils.flatten import flatten
from markdown_it import MarkdownIt

from review.data_changes import TEST, DataChanges, without_template
from review.revisions import Revision, hashes
from review.runs import METRICS_FILE
from review.verdicts import PREFIXES, Results

SAMPLES = "metrics/samples/tuned.md"
NUM_EXAMPLES = 10


@dataclass(frozen=True)
class Change:
    """A named value in both revisions; None if a revision does not have it."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class StageRun:
    """A stage that ran again, with its changed inputs and changed outputs."""

    name: str
    changed_inputs: list[str]
    changed_outputs: list[str]


def values_by_name(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each name, in the order of `after`, then the names that only `before` has."""
    return {name: (before.get(name), after.get(name)) for name in {**after, **before}}


def find_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The values that differ, including those that only one side has."""
    return [Change(name, *values) for name, values in values_by_name(before, after).items() if values[0] != values[1]]


def changed_metrics(before: Revision, after: Revision, results: Mapping[str, Results]) -> list[Change]:
    """Changes in metrics that have no verdict: those of data and training, and those without an interval.

    Args:
        results: those with a verdict, by split.
    """
    with_verdict = {
        PREFIXES[split] + result.metric.name for split, of_split in results.items() for result in of_split.metrics
    }
    changes = []
    for path in sorted({*before.metrics_files(), *after.metrics_files()}):
        values = [flatten(side.read_json(path)) for side in (before, after)]
        name = path.removeprefix("metrics/").removesuffix(".json")
        changes += [
            Change(f"{name}: {change.name}", change.before, change.after)
            for change in find_changes(*values)
            if not change.name.startswith(("slices.", "retention.slices."))
            and not (path == METRICS_FILE and (change.name in with_verdict or change.name.endswith("_se")))
        ]
    return changes


def stages_that_ran(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[StageRun]:
    """The stages whose inputs or outputs differ between two `dvc.lock` files."""
    runs = []
    for name, (old, new) in values_by_name(before.get("stages", {}), after.get("stages", {})).items():
        if old is None or new is None:
            runs.append(StageRun(name, ["new stage" if old is None else "removed stage"], []))
            continue
        params = [
            f"{change.name.removeprefix('params.yaml.')}: {json.dumps(change.before)} → {json.dumps(change.after)}"
            for change in find_changes(flatten(old.get("params", {})), flatten(new.get("params", {})))
        ]
        deps, outs = (
            [change.name for change in find_changes(hashes(old.get(kind, [])), hashes(new.get(kind, [])))]
            for kind in ("deps", "outs")
        )
        changed_inputs = (["its command"] if old["cmd"] != new["cmd"] else []) + params + deps
        if changed_inputs or outs:
            runs.append(StageRun(name, changed_inputs, outs))
    return runs


def changed_samples(before: Revision, after: Revision) -> list[Change]:
    """The answers of both revisions to each sample prompt."""
    return [Change(name, *answers) for name, answers in values_by_name(_samples(before), _samples(after)).items()]


def _samples(revision: Revision) -> dict[str, str]:
    """Answers by prompt, parsed from the Markdown that `generate` writes."""
    samples: dict[str, str] = {}
    prompt = ""
    tokens = MarkdownIt().parse((revision.read(SAMPLES) or b"").decode(errors="replace"))
    for token, following in zip(tokens, [*tokens, None][1:], strict=True):
        if token.type == "heading_open" and token.tag == "h2" and following and following.children:
            prompt = "".join(child.content for child in following.children)
        elif token.type == "code_block" and prompt:
            samples[prompt] = token.content.strip()
    return samples


def most_changed_examples(joined: pd.DataFrame | None, after: Revision, data: DataChanges) -> pd.DataFrame:
    """The test examples whose loss fell most, then those whose loss rose most, up to `NUM_EXAMPLES` each.

    Args:
        joined: from `compare_predictions`; None if a side has no predictions.
        data: to find the new training row that is nearest to each example.

    Returns:
        The columns of `joined`, the change of the loss (nats/token), the prompt, the response, and the nearest new
        training prompt, which is empty if none is similar. Prompts are without the lines of the template.
    """
    if joined is None:
        return pd.DataFrame(columns=["change"])
    columns = ["example_id", "prompt", "response"]
    test = after.read_table(TEST, columns)
    test = pd.DataFrame(columns=columns) if test is None else test.drop_duplicates("example_id")
    rows = joined.assign(change=joined["loss_after"] - joined["loss_before"]).merge(test, on="example_id", how="left")
    improved = rows[rows["change"] < 0].nsmallest(NUM_EXAMPLES, "change")
    worse = rows[rows["change"] > 0].nlargest(NUM_EXAMPLES, "change")
    chosen = pd.concat([improved, worse])
    chosen = chosen.fillna(dict.fromkeys(("prompt", "response", "answer_before", "answer_after"), ""))
    nearest = [without_template(prompt or "") for prompt in data.nearest_new_prompts(chosen["prompt"].tolist())]
    prompts = chosen["prompt"].map(without_template)
    prompts = prompts.where(prompts != "", "(example " + chosen["example_id"] + ")")
    return chosen.assign(prompt=prompts, nearest=nearest)
