"""Render a comparison as Markdown, for a pull request, and as a self-contained HTML page."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from review.changes import Change, ExampleChange
from review.comparison import Comparison
from review.data_changes import CHANGES, DataChanges, without_template
from review.gates import GateResult
from review.verdicts import MEASURE_NOISE, RUN_NOISE_UNKNOWN, MetricResult, describe_difference, signed
from stages.runtime.text import code, heading

MAX_CELL_LENGTH = 240  # characters of an example's text in a table
SIGN = {"better": "✅ better", "worse": "❌ worse"}
RESULT_HEADER = ["before", "after", "difference (95% interval)", "p", "detectable", "needed", "verdict"]
ABOUT_METRICS = (
    "The interval covers the choice of test prompts and, if run noise is known, of training seeds. p: the probability "
    "of a difference at least this large if the true difference is 0, corrected for the number of tests (Holm). "
    "Detectable: the smallest true difference that this test set and these runs detect in 80% of cases, before this "
    "correction. Needed: the total number of test prompts, or of runs per revision, with which the observed difference "
    "would be detectable. docs/verdicts.md explains the method."
)
# Text that begins a mention, a reference or a link on GitHub. An invisible word joiner after it prevents that.
LINKS = re.compile(r"@(?=\w)|#(?=\d)|www(?=\.)|:(?=//)", re.IGNORECASE)

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d1d9e0, #3d444d); --shade: light-dark(#f6f8fa, #151b23) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#1f2328, #f0f6fc); background: light-dark(#fff, #0d1117) }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border: 1px solid var(--line); padding: .35rem .7rem; text-align: left; vertical-align: top }
th { background: var(--shade) } td { font-variant-numeric: tabular-nums }
code { background: var(--shade); padding: .1rem .3rem; border-radius: .25rem; overflow-wrap: anywhere }
td s { background: light-dark(#ffebe9, #5d1a1d); color: light-dark(#82071e, #ffdcd7) }
td strong { background: light-dark(#dafbe1, #12432a); color: light-dark(#116329, #aff5b4); font-weight: inherit }
img { max-width: min(100%, 34rem) } svg { display: block; max-width: 100%; height: auto }
figure { margin: 1.5rem 0 } figcaption { font-size: 13px; opacity: .8 }
h1, h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem }
"""


def markdown(comparison: Comparison, gates: Sequence[GateResult], curves: str) -> str:
    """The report. `curves` is Markdown: Mermaid text for GitHub, images for the page."""
    before, after = (code(side.name) for side in (comparison.before, comparison.after))
    parts = [f"# Review: {before} → {after}", *summary_in_words(comparison, gates)]
    if gates:
        rows = [[text(gate.rule), "✅ passed" if gate.passed else "❌ failed", text(gate.found)] for gate in gates]
        parts += ["## Gates", table(["gate", "", "found"], rows)]
    parts += ["## Metrics on the test split", metrics_table(comparison.metrics), ABOUT_METRICS]
    parts += map(text, comparison.notes)
    missing = [(side.name, path) for side in (comparison.before, comparison.after) for path in sorted({*side.missing})]
    if missing:
        parts.append(missing_files(missing))
    losses = [result for result in comparison.slices if result.metric.name == "loss" or result.is_significant]
    parts += section("## Slices of the test split", slices_table(losses))
    parts += section("## Changed parameters", changed_table(comparison.params))
    parts += section("## Stages that ran again", stages_table(comparison))
    parts += section("## Changed data", "\n\n".join(data_tables(comparison.data)))
    parts += section("## Other metrics that changed", changed_table(comparison.other_metrics))
    parts += section("## Curves", curves)
    parts += section("## Sample answers", samples_table(comparison.samples))
    improved = [example for example in comparison.examples if example.change < 0]
    worse = [example for example in comparison.examples if example.change > 0]
    parts += section("## Most improved test examples", examples_table(improved))
    parts += section("## Test examples that got worse the most", examples_table(worse))
    return "\n\n".join(parts) + "\n"


def section(title: str, content: str) -> list[str]:
    return [title, content] if content else []


def summary_in_words(comparison: Comparison, gates: Sequence[GateResult]) -> list[str]:
    """The verdict in words: on the test loss, on the other metrics and slices, on the gates, and how to learn more."""
    parts = [f"**{headline(comparison)}**"]
    others = [result for result in comparison.metrics if result.metric.name != "loss" and result.is_significant]
    others += [result for result in comparison.slices if result.is_significant]
    titles = {**SIGN, "higher": "Higher", "lower": "Lower", "unknown": "These two models differ in"}
    for verdict, title in titles.items():
        if names := [label(result) for result in others if result.verdict == verdict]:
            parts.append(f"{title}: {', '.join(names)}.")
    if failed := [gate.rule for gate in gates if not gate.passed]:
        parts.append(f"❌ Gates that failed: {text('; '.join(failed))}.")
    elif gates:
        parts.append(f"✅ All gates passed ({len(gates)}).")
    if any(result.verdict == "unknown" for result in comparison.metrics):
        parts.append(
            "Another training seed also gives another model, and how much that changes the metrics is not known here. "
            f"To measure it: {code(MEASURE_NOISE)}, and the same for the other revision."
        )
    return parts


def headline(comparison: Comparison) -> str:
    """One sentence: the verdict on the test loss, which training minimizes."""
    loss = comparison.metric("loss")
    if loss.difference is None:
        return f"Test loss: {loss.verdict}."
    verdict = SIGN.get(loss.verdict, loss.verdict)
    if loss.verdict == "unknown":
        verdict = f"{'these two models differ' if loss.is_significant else 'no difference found'}; {RUN_NOISE_UNKNOWN}"
    change = f"{loss.difference.before:.4f} → {loss.difference.after:.4f} nats/token"
    return f"Test loss: {verdict}. {change}, {describe_difference(loss.difference)}."


def label(result: MetricResult) -> str:
    return text(result.metric.name) + (f" in {code(truncate(result.slice))}" if result.slice else "")


def metrics_table(results: Sequence[MetricResult]) -> str:
    rows = [[text(result.metric.name), *result_cells(result)] for result in results]
    return table(["metric", *RESULT_HEADER], rows)


def slices_table(results: Sequence[MetricResult]) -> str:
    rows = [
        [
            code(truncate(result.slice or "")),
            text(result.metric.name),
            f"{result.difference.variances.num_prompts:,}" if result.difference else "",
            *result_cells(result),
        ]
        for result in results
    ]
    return table(["slice", "metric", "prompts", *RESULT_HEADER], rows) if rows else ""


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


def missing_files(missing: Sequence[tuple[str, str]]) -> str:
    listed = ", ".join(f"{code(path)} of {code(revision)}" for revision, path in missing)
    paths = " ".join(sorted({path for _, path in missing}))
    return (
        f"**Not available**: {listed}. They are neither in git nor in the local DVC cache. If a remote has them, get "
        f"them with {code(f'dvc pull --all-commits {paths}')}, or {code('dvc exp pull')} for an experiment; otherwise "
        f"{code('dvc repro')} in a checkout of that revision writes them again."
    )


def changed_table(changes: Sequence[Change]) -> str:
    rows = [[code(change.name), value(change.before), value(change.after)] for change in changes]
    return table(["name", "before", "after"], rows) if rows else ""


def value(content: Any) -> str:
    return "" if content is None else code(f"{content:.6g}" if isinstance(content, float) else content)


def stages_table(comparison: Comparison) -> str:
    def listed(names: Sequence[str]) -> str:
        return ", ".join(map(code, names)) or "none"

    rows = [
        [code(stage.name), listed(stage.changed_inputs), listed(stage.changed_outputs)] for stage in comparison.stages
    ]
    return table(["stage", "changed inputs", "changed outputs"], rows) if rows else ""


def samples_table(samples: Sequence[Change]) -> str:
    rows = [[text(sample.name), *highlight_diff(sample.before, sample.after)] for sample in samples]
    return table(["prompt", "before", "after"], rows) if rows else ""


def examples_table(examples: Sequence[ExampleChange]) -> str:
    rows = [
        [
            f"{signed(example.change)} ({example.loss_before:.2f} → {example.loss_after:.2f})",
            text(truncate(example.prompt)),
            text(truncate(example.reference)),
            *highlight_diff(truncate(example.answer_before), truncate(example.answer_after)),
            text(truncate(example.nearest_new_prompt or "")),
        ]
        for example in examples
    ]
    header = [
        "loss (nats/token)",
        "prompt",
        "reference",
        "answer before",
        "answer after",
        "nearest new training prompt",
    ]
    return table(header, rows) if rows else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def truncate(content: str) -> str:
    return content if len(content) <= MAX_CELL_LENGTH else content[:MAX_CELL_LENGTH] + " …"


def text(content: str) -> str:
    """Untrusted text for a table cell: no markup, mentions or links; line breaks become symbols."""
    return LINKS.sub("\\g<0>\N{WORD JOINER}", heading(one_line(content)))


def one_line(content: str) -> str:
    return re.sub(r"\s*\n\s*", " ⏎ ", content.strip())


def highlight_diff(before: str | None, after: str | None) -> tuple[str, str]:
    """Both texts; removed words are struck through in the first, added words are bold in the second."""
    if before is None or after is None:
        return text(before or "(no such prompt)"), text(after or "(no such prompt)")
    words = [one_line(side).split() for side in (before, after)]
    sides: tuple[list[str], list[str]] = ([], [])
    matcher = SequenceMatcher(None, words[0], words[1], autojunk=False)
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        for side, mark, part in ((0, "~~", words[0][start:end]), (1, "**", words[1][other_start:other_end])):
            if part:
                around = "" if kind == "equal" else mark
                sides[side].append(around + text(" ".join(part)) + around)
    return " ".join(sides[0]), " ".join(sides[1])


def page(content: str, title: str, figures: str = "") -> str:
    """Markdown as an HTML page without scripts and external resources. `figures` is SVG, placed after the summary."""
    body = str(MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render(content))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"{body.replace('<h2>', f'{figures}<h2>', 1)}</body></html>\n"
    )
