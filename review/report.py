"""Render a comparison as Markdown."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from review.changes import Change, StageRun
from review.comparison import Comparison
from review.data_changes import CHANGES, DataChanges, without_template
from review.gates import NOTHING_TO_COMPARE, GateResult
from review.markup import highlight_diff, table, text, truncate
from review.must_pass import BAD, MustPass, counted
from review.verdicts import MEASURE_NOISE, RUN_NOISE_UNKNOWN, MetricResult, Results, describe_difference, signed
from review.votes import Tally, VoteResults
from stages.scoring.scorers import SCORERS
from stages.text import block, code

SIGN = {"better": "✓ better", "worse": "✗ worse"}
MAX_OUTDATED = 8  # differences that are listed for each outdated revision
RESULT_HEADER = ["before", "after", "difference (95% interval)", "p", "detectable", "needed", "verdict"]
ABOUT_METRICS = (
    "The interval covers the choice of test prompts and, if run noise is known, of training seeds. p: the probability "
    "of a difference at least this large if the true difference is 0, corrected for the number of tests (Holm). "
    "Detectable: the smallest true difference that this test set and these runs detect in 80% of cases, before this "
    "correction. Needed: the total number of test prompts, or of runs per revision, with which the observed difference "
    "would be detectable. docs/verdicts.md explains the method."
)
ABOUT_RETENTION = "General questions that are never trained on; a lower pass rate means lost abilities."


def markdown(comparison: Comparison, gates: Sequence[GateResult], curves: str) -> str:
    """The report. `curves` is Markdown: Mermaid text for GitHub, images for the page."""
    before, after = (code(side.name) for side in (comparison.before, comparison.after))
    test, retention, harness = comparison.test, comparison.results.get("retention"), comparison.harness
    notable_slices = [result for result in test.slices if result.metric.name == "loss" or result.is_significant]
    examples, scorers = comparison.examples, comparison.changed_scorers
    sections = {
        "Gates": [gates_table(gates)],
        "Metrics on the test split": [metrics_table(test.metrics), ABOUT_METRICS, *map(text, test.notes)],
        "Metrics on the retention set": [ABOUT_RETENTION, *metrics_and_notes(retention)] if retention else [],
        "Tasks of lm-evaluation-harness": metrics_and_notes(harness) if harness else [],
        "Must-pass examples": [must_pass_table(comparison.must_pass or [])],
        "Votes": [votes_table(comparison.votes)],
        "Changed conditions": [
            changed_table(comparison.changed_conditions),
            *([f"Changed lines of {code(SCORERS)}:", block("\n".join(scorers))] if scorers else []),
        ],
        "Not available": [missing_table(comparison)],
        "Slices of the test split": [slices_table(notable_slices)],
        "Changed parameters": [changed_table(comparison.params)],
        "Stages that ran again": [stages_table(comparison.stages)],
        "Changed data": data_tables(comparison.data),
        "Other metrics that changed": [changed_table(comparison.other_metrics)],
        "Curves": [curves],
        "Sample answers": [samples_table(comparison.samples)],
        "Most improved test examples": [examples_table(examples[examples["change"] < 0])],
        "Test examples that got worse the most": [examples_table(examples[examples["change"] > 0])],
    }
    parts = [f"# Review: {before} → {after}", *evidence_in_words(comparison, gates)]
    parts += summary_in_words(comparison, gates)
    for title, paragraphs in sections.items():
        if any(paragraphs):
            parts += [f"## {title}", *filter(None, paragraphs)]
    return "\n\n".join(parts) + "\n"


def evidence_in_words(comparison: Comparison, gates: Sequence[GateResult]) -> list[str]:
    """What limits the evidence: outdated stages, revisions without results, and changed conditions."""
    parts = []
    for name, stages in comparison.outdated.items():
        more = [f"and {len(stages) - MAX_OUTDATED:,} more"] if len(stages) > MAX_OUTDATED else []
        parts.append(
            f"**✗ The results of {code(name)} are outdated, so no gate is decided:** they do not belong to its "
            f"code, parameters and data. {text('; '.join([*stages[:MAX_OUTDATED], *more]))}. Run {code('dvc repro')} "
            "there, commit the results and review again."
        )
    parts += [f"**{text(warning)}**" for warning in comparison.warnings()]
    if uncompared := [gate.rule for gate in gates if gate.passed and gate.found.startswith(NOTHING_TO_COMPARE)]:
        parts.append(f"**Passed without a comparison:** {text('; '.join(uncompared))}.")
    if changed := comparison.changed_kinds():
        parts.append(f"**Changed conditions:** {text(', '.join(changed))}. The section of that name lists them.")
    return parts


def summary_in_words(comparison: Comparison, gates: Sequence[GateResult]) -> list[str]:
    """The verdict in words: on the test loss, on the other metrics and slices, on the gates, and how to learn more."""
    parts = [f"**{headline(comparison)}**"]
    others = [result for result in comparison.test.metrics if result.metric.name != "loss"] + comparison.test.slices
    parts += verdicts_in_words(others, "")
    if retention := comparison.results.get("retention"):
        parts += verdicts_in_words(retention.metrics, " on the retention set")
    if failed := [gate.rule for gate in gates if not gate.passed]:
        parts.append(f"✗ Gates that failed: {text('; '.join(failed))}.")
    elif gates:
        parts.append(f"✓ All gates passed ({len(gates)}).")
    if any(result.verdict == "unknown" for result in comparison.test.metrics):
        parts.append(
            "Another training seed also gives another model, and how much that changes the metrics is not known here. "
            f"To measure it: {code(MEASURE_NOISE)}, and the same for the other revision."
        )
    return parts


def verdicts_in_words(results: Sequence[MetricResult], where: str) -> list[str]:
    """A sentence for each kind of verdict on significant differences."""
    titles = {**SIGN, "higher": "Higher", "lower": "Lower", "unknown": "These two models differ in"}
    names_by_title = {
        title: [label(result) for result in results if result.is_significant and result.verdict == verdict]
        for verdict, title in titles.items()
    }
    return [f"{title}: {', '.join(names)}{where}." for title, names in names_by_title.items() if names]


def headline(comparison: Comparison) -> str:
    """One sentence: the verdict on the test loss, which training minimizes."""
    loss = comparison.test.metrics[0]
    if loss.difference is None:
        return f"Test loss: {loss.verdict}."
    verdict = SIGN.get(loss.verdict, loss.verdict)
    if loss.verdict == "unknown":
        verdict = f"{'these two models differ' if loss.is_significant else 'no difference found'}; {RUN_NOISE_UNKNOWN}"
    change = f"{loss.difference.before:.4f} → {loss.difference.after:.4f} nats/token"
    return f"Test loss: {verdict}. {change}, {describe_difference(loss.difference)}."


def label(result: MetricResult) -> str:
    return text(result.metric.name) + (f" in {code(truncate(result.slice))}" if result.slice else "")


def gates_table(gates: Sequence[GateResult]) -> str:
    rows = [[text(gate.rule), "✓ passed" if gate.passed else "✗ failed", text(gate.found)] for gate in gates]
    return table(["gate", "", "found"], rows)


def metrics_table(results: Sequence[MetricResult]) -> str:
    rows = [[text(result.metric.name), *result_cells(result)] for result in results]
    return table(["metric", *RESULT_HEADER], rows)


def metrics_and_notes(results: Results) -> list[str]:
    return [metrics_table(results.metrics), *map(text, results.notes)]


def missing_table(comparison: Comparison) -> str:
    """The files that could not be read, why, and what helps."""
    rows = [
        [code(path), code(side.name), text(reason)]
        for side in (comparison.before, comparison.after)
        for path, reason in sorted(side.missing.items())
    ]
    help_ = (
        f"{code('dvc repro')} in a checkout of that revision writes them again. If they were written on another "
        f"machine and both can use the same DVC remote, {code('dvc push')} there makes them available here."
    )
    return f"{table(['file', 'revision', 'reason'], rows)}\n\n{help_}" if rows else ""


def slices_table(results: Sequence[MetricResult]) -> str:
    rows = []
    for result in results:
        prompts = f"{result.difference.variances.num_prompts:,}" if result.difference else ""
        rows.append([code(truncate(result.slice or "")), text(result.metric.name), prompts, *result_cells(result)])
    return table(["slice", "metric", "prompts", *RESULT_HEADER], rows)


def result_cells(result: MetricResult) -> list[str]:
    values = ["" if value is None else f"{value:.4f}" for value in (result.before, result.after)]
    verdict = SIGN.get(result.verdict, text(result.verdict))
    difference = result.difference
    if difference is None:
        return [*values, "", "", "", "", verdict]
    if result.verdict == "unknown":
        verdict = f"{'differ' if result.is_significant else 'no difference found'}; {RUN_NOISE_UNKNOWN}"
    needed = ""
    if not result.is_significant and difference.value:
        numbers = (difference.prompts_needed, "prompts"), (difference.runs_needed, "runs")
        needed = " or ".join(f"{number:,} {unit}" for number, unit in numbers if number) or "more of both"
    return [
        *values,
        f"{signed(difference.value)} ({signed(difference.low)} to {signed(difference.high)})",
        "<0.001" if result.p_value < 0.001 else f"{result.p_value:.3f}",
        f"{difference.variances.detectable:.4f}",
        needed,
        verdict,
    ]


def must_pass_table(examples: Sequence[MustPass]) -> str:
    """The examples that do not pass in both revisions, and the number of all."""
    marks = {"fixed": "✓ fixed"} | {state: f"✗ {state}" for state in BAD}
    rows = []
    for example in examples:
        if example.state != "passing":
            answers = highlight_diff(truncate(example.answer_before), truncate(example.answer_after))
            rows.append([marks.get(example.state, example.state), text(truncate(example.prompt)), *answers])
    listed = table(["", "prompt", "answer before", "answer after"], rows)
    return f"{counted(examples)}.\n\n{listed}".strip() if examples else ""


def votes_table(votes: VoteResults | None) -> str:
    """The votes of all and of each voter, how often two voters agree, and which votes do not count."""
    if votes is None:
        return ""
    notes = [text(note) for note in votes.notes]
    if not votes.by_voter:
        return "\n\n".join(notes)
    names = [name for name, _ in votes.by_voter]
    labels = {
        voter: text(voter[0] if names.count(voter[0]) == 1 else f"{voter[0]} ({voter[1]})") for voter in votes.by_voter
    }
    rows = [
        [labels[voter], *(f"{number:,}" for number in (tally.wins, tally.losses, tally.ties)), share(tally)]
        for voter, tally in votes.by_voter.items()
    ]
    total = votes.overall
    verdict = SIGN.get(total.verdict, "undecided; more votes are needed")
    lines = [
        f"**After was better on {total.wins:,} prompts, worse on {total.losses:,} and equal on {total.ties:,}, of "
        f"{votes.num_pairs:,} with different answers: {verdict}.** Share of after among the decided: {share(total)}, a "
        "95% confidence sequence, which is valid whenever voting ends. Each prompt counts once, by its first vote.",
        table(["voter", "after", "before", "equal", "share of after"], rows),
    ]
    lines += [
        f"{labels[first]} and {labels[second]} agree on {same:,} of {common:,} prompts."
        for (first, second), (common, same) in votes.agreement.items()
    ]
    return "\n\n".join([*lines, *notes])


def share(tally: Tally) -> str:
    low, high = tally.interval
    return f"{low:.0%} to {high:.0%}"


def data_tables(data: DataChanges) -> list[str]:
    """The numbers of changed rows by split and by origin, and examples of each kind of change."""
    if not data.is_known:
        return ["The data of a revision is not available, so its changes are not known."]
    if data.rows.empty:
        return []
    parts = []
    for by in (["split"], ["source", "slice"]):
        counts = data.counts(*by)
        rows = [
            [*(code(row[name]) for name in by), *(f"{row[kind]:,}" for kind in CHANGES)] for _, row in counts.iterrows()
        ]
        parts.append(table([*by, *CHANGES], rows))
    rows = [
        [change, row.split, text(truncate(without_template(row.prompt))), text(truncate(row.response))]
        for change in CHANGES
        for row in data.examples(change).itertuples()
    ]
    return [*parts, table(["change", "split", "prompt", "response"], rows)]


def changed_table(changes: Sequence[Change]) -> str:
    rows = [[code(change.name), value(change.before), value(change.after)] for change in changes]
    return table(["name", "before", "after"], rows)


def value(content: Any) -> str:
    return "" if content is None else code(f"{content:.6g}" if isinstance(content, float) else content)


def stages_table(stages: Sequence[StageRun]) -> str:
    rows = []
    for stage in stages:
        changed = (", ".join(map(code, names)) or "none" for names in (stage.changed_inputs, stage.changed_outputs))
        rows.append([code(stage.name), *changed])
    return table(["stage", "changed inputs", "changed outputs"], rows)


def samples_table(samples: Sequence[Change]) -> str:
    rows = [[text(sample.name), *highlight_diff(sample.before, sample.after)] for sample in samples]
    return table(["prompt", "before", "after"], rows)


def examples_table(examples: pd.DataFrame) -> str:
    header = [
        "loss (nats/token)",
        "prompt",
        "reference",
        "answer before",
        "answer after",
        "nearest new training prompt",
    ]
    rows = []
    for row in examples.itertuples():
        loss = f"{signed(row.change)} ({row.loss_before:.2f} → {row.loss_after:.2f})"
        prompt, reference, nearest = (text(truncate(content)) for content in (row.prompt, row.response, row.nearest))
        answers = highlight_diff(truncate(row.answer_before), truncate(row.answer_after))
        rows.append([loss, prompt, reference, *answers, nearest])
    return table(header, rows)
