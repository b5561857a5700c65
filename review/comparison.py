"""What changed between two revisions, as data: parameters, metrics, stages, answers, examples."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from markdown_it import MarkdownIt

from review.revisions import Revision
from review.statistics import Difference, compare
from stages.shared.templates import ALPACA, ALPACA_WITH_INPUT

PREDICTIONS, METRICS = "data/predictions/tuned.parquet", "metrics/evaluate/tuned.json"
SAMPLES, TEST = "metrics/samples/tuned.md", "data/test.parquet"
NUM_EXAMPLES = 10
TEMPLATE_LINES = {*ALPACA.splitlines(), *ALPACA_WITH_INPUT.splitlines()}


@dataclass(frozen=True)
class Metric:
    """A metric of the test split: a sum over examples ÷ a count, which is 1 an example where `counts` is None.

    Attributes:
        better: -1 where lower is better, 1 where higher is, 0 where neither.
        of_tokens: whether it is taken over supervised tokens, so that both models must have had the same ones.
    """

    name: str
    better: int
    sums: Callable[[pa.Table], Any]
    counts: str | None = None

    @property
    def of_tokens(self) -> bool:
        return self.counts is not None


def column(name: str) -> Callable[[pa.Table], Any]:
    return lambda table: table[name].to_numpy().astype(float)


TOKENS = column("tokens")
MEASURED = (
    Metric("loss", -1, lambda table: column("loss")(table) * TOKENS(table), "tokens"),
    Metric("token_accuracy", 1, column("correct_tokens"), "tokens"),
    Metric("exact_match", 1, column("exact_match")),
    Metric("rouge_l", 1, column("rouge_l")),
    Metric("stop_rate", 1, column("stopped")),
    Metric("mean_response_tokens", 0, column("answer_tokens")),
)


@dataclass(frozen=True)
class Verdict:
    """One metric of both revisions. `difference` is None where it could not be computed, and `words` say why."""

    metric: Metric
    before: float | None
    after: float | None
    difference: Difference | None
    words: str

    @property
    def is_worse(self) -> bool:
        return self.words == "worse"


@dataclass(frozen=True)
class Changed:
    """A value by its name, as text; None where that revision has none."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class StageRun:
    """A stage that ran again: what it saw that was another, and which of its outputs came out as others."""

    name: str
    because: list[str]
    changed: list[str]


@dataclass(frozen=True)
class ExampleChange:
    """A test example of both revisions, its prompt without the lines of the template."""

    prompt: str
    reference: str
    loss_before: float
    loss_after: float
    answer_before: str
    answer_after: str

    @property
    def change(self) -> float:
        """In nats a token; below 0 where the model after is better."""
        return self.loss_after - self.loss_before


@dataclass(frozen=True)
class Comparison:
    """All that a review says of two revisions. `notes` are for the reader of the metrics."""

    before: Revision
    after: Revision
    params: list[Changed]
    verdicts: list[Verdict]
    same_test_set: bool
    other_metrics: list[Changed]
    stages: list[StageRun]
    samples: list[Changed]
    examples: list[ExampleChange]
    notes: list[str]

    def verdict(self, name: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.metric.name == name)


def compare_revisions(before: Revision, after: Revision) -> Comparison:
    locks = [side.read_yaml("dvc.lock") for side in (before, after)]
    outputs = [output_hashes(lock) for lock in locks]
    same_test_set = outputs[0].get(TEST) == outputs[1].get(TEST) is not None
    same_predictions = outputs[0].get(PREDICTIONS) == outputs[1].get(PREDICTIONS) is not None
    verdicts, notes, both = compare_predictions(before, after, same_test_set, same_predictions)
    return Comparison(
        before,
        after,
        params=differing(before.read_yaml("params.yaml"), after.read_yaml("params.yaml")),
        verdicts=verdicts,
        same_test_set=same_test_set,
        other_metrics=other_metrics(before, after),
        stages=stages_that_ran(*locks),
        samples=[
            Changed(name, *answers) for name, answers in by_name(read_samples(before), read_samples(after)).items()
        ],
        examples=[] if both is None else most_changed(*both, after),
        notes=notes,
    )


def compare_predictions(
    before: Revision, after: Revision, same_test_set: bool, same_predictions: bool
) -> tuple[list[Verdict], list[str], tuple[pa.Table, pa.Table] | None]:
    """A verdict for each metric, notes for the reader, and the predictions of both on their common examples.

    Args:
        same_test_set, same_predictions: by the hashes in `dvc.lock`, so that nothing is fetched where all is the same.
    """
    known = [side.read_json(METRICS) for side in (before, after)]

    def unknown(words: str) -> list[Verdict]:
        return [
            Verdict(metric, known[0].get(metric.name), known[1].get(metric.name), None, words) for metric in MEASURED
        ]

    if not all(known):
        which = " and ".join(side.name for side, metrics in zip((before, after), known, strict=True) if not metrics)
        return unknown("not known"), [f"{which} has no {METRICS}: `dvc repro` there makes it."], None
    if same_predictions and known[0] == known[1]:
        return unknown("the same"), ["Both revisions have the same predictions on the test split, to the bit."], None
    tables = [side.read_table(PREDICTIONS) for side in (before, after)]
    if tables[0] is None or tables[1] is None:
        return unknown("not known: no predictions"), [] if same_test_set else ["The test sets differ."], None

    first, second = common_rows(tables[0], tables[1])
    notes = []
    if not len(first) == len(tables[0]) == len(tables[1]):
        notes.append(
            f"The test sets differ: {before.name} has {len(tables[0]):,} examples, {after.name} {len(tables[1]):,}. "
            f"Only the {len(first):,} that both have are compared, so the values differ from those of {METRICS}."
        )
    if len(first) < 2:
        return unknown("not known: no common examples"), notes, None
    others = int((TOKENS(first) != TOKENS(second)).sum())
    if others:
        notes.append(
            f"{others:,} of {len(first):,} examples have another number of supervised tokens (another tokenizer, "
            "template or max_length): loss and token accuracy can't be compared."
        )
    sides = []
    for table in (first, second):
        counts = [np.ones(len(table)) if metric.counts is None else column(metric.counts)(table) for metric in MEASURED]
        sides.append((np.stack([metric.sums(table) for metric in MEASURED]), np.stack(counts)))
    verdicts = []
    for metric, difference in zip(MEASURED, compare(sides[0], sides[1]), strict=True):
        words = in_words(metric, difference)
        if others and metric.of_tokens:
            verdicts.append(Verdict(metric, difference.before, difference.after, None, "can't be compared"))
        else:
            verdicts.append(Verdict(metric, difference.before, difference.after, difference, words))
    return verdicts, notes, (first, second)


def in_words(metric: Metric, difference: Difference) -> str:
    if difference.value == 0 and difference.low == difference.high:
        return "the same"
    if not difference.is_real:
        return "within noise"
    if not metric.better:
        return "higher" if difference.value > 0 else "lower"
    return "better" if difference.value * metric.better > 0 else "worse"


def common_rows(before: pa.Table, after: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows of both tables with the same `example_id`, in the order of `before`."""
    place = {example_id: row for row, example_id in enumerate(after["example_id"].to_pylist())}
    ids = before["example_id"].to_pylist()
    rows = [row for row, example_id in enumerate(ids) if example_id in place]
    first = before.take(pa.array(rows, pa.int64()))
    return first, after.take(pa.array([place[ids[row]] for row in rows], pa.int64()))


def most_changed(first: pa.Table, second: pa.Table, after: Revision) -> list[ExampleChange]:
    """The examples whose loss fell most, then those whose loss rose most, up to `NUM_EXAMPLES` each."""
    change = second["loss"].to_numpy() - first["loss"].to_numpy()
    order = change.argsort(kind="stable").tolist()
    gained = [row for row in order[:NUM_EXAMPLES] if change[row] < 0]
    lost = [row for row in order[::-1][:NUM_EXAMPLES] if change[row] > 0]
    test = after.read_table(TEST, ["example_id", "prompt", "response"])
    texts = {} if test is None else {row["example_id"]: row for row in test.to_pylist()}
    examples = []
    for row in gained + lost:
        one, other = (table.slice(row, 1).to_pylist()[0] for table in (first, second))
        text = texts.get(one["example_id"], {"prompt": f"(example {one['example_id']})", "response": ""})
        own_lines = [line for line in text["prompt"].splitlines() if line not in TEMPLATE_LINES]
        examples.append(
            ExampleChange(
                prompt="\n".join(own_lines),
                reference=text["response"],
                loss_before=one["loss"],
                loss_after=other["loss"],
                answer_before=one["answer"],
                answer_after=other["answer"],
            )
        )
    return examples


def by_name(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each name, in the order of `after`, then what only `before` has."""
    return {name: (before.get(name), after.get(name)) for name in {**after, **before}}


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Changed]:
    return [Changed(name, *values) for name, values in by_name(before, after).items() if values[0] != values[1]]


def other_metrics(before: Revision, after: Revision) -> list[Changed]:
    """What differs in the metrics that no verdict is on: of data and training, and what has no interval."""
    shown = {metric.name for metric in MEASURED}
    changed = []
    for path in sorted({*before.metrics_files(), *after.metrics_files()}):
        values = [flatten(side.read_json(path)) for side in (before, after)]
        name = path.removeprefix("metrics/").removesuffix(".json")
        changed += [
            Changed(f"{name}: {entry.name}", entry.before, entry.after)
            for entry in differing(*values)
            if not (path == METRICS and (entry.name in shown or entry.name.endswith("_se")))
        ]
    return changed


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names.

    Example:
        >>> flatten({"left_out_by_reason": {"empty_response": 2}})
        {'left_out_by_reason.empty_response': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def stages_that_ran(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[StageRun]:
    """From two `dvc.lock`s: the stages that had something else to work on."""
    found = []
    for name, (old, new) in by_name(before.get("stages", {}), after.get("stages", {})).items():
        if old is None or new is None:
            found.append(StageRun(name, ["new stage" if old is None else "no longer a stage"], []))
            continue
        params = [
            f"{entry.name}: {json.dumps(entry.before)} → {json.dumps(entry.after)}"
            for entry in differing(flatten(old.get("params", {})), flatten(new.get("params", {})))
        ]
        params = [text.removeprefix("params.yaml.") for text in params]
        deps, outs = (
            [entry.name for entry in differing(_hashes(old.get(kind, [])), _hashes(new.get(kind, [])))]
            for kind in ("deps", "outs")
        )
        because = (["its command"] if old["cmd"] != new["cmd"] else []) + params + deps
        if because or outs:
            found.append(StageRun(name, because, outs))
    return found


def _hashes(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in entries}


def output_hashes(lock: Mapping[str, Any]) -> dict[str, str]:
    """The MD5 of each output in a `dvc.lock`."""
    return {path: md5 for stage in lock.get("stages", {}).values() for path, md5 in _hashes(stage["outs"]).items()}


def read_samples(revision: Revision) -> dict[str, str]:
    """The answers to the sample prompts, by prompt, out of the Markdown that `generate` writes."""
    samples: dict[str, str] = {}
    prompt = ""
    tokens = MarkdownIt().parse((revision.read(SAMPLES) or b"").decode())
    for token, following in zip(tokens, [*tokens, None][1:], strict=True):
        if token.type == "heading_open" and token.tag == "h2" and following and following.children:
            prompt = "".join(child.content for child in following.children)
        elif token.type == "code_block" and prompt:
            samples[prompt] = token.content.strip()
    return samples
