"""Render a comparison as Markdown, for a pull request, and as a self-contained HTML page."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from review.changes import Change, ExampleChange
from review.comparison import Comparison
from review.gates import GateResult
from review.verdicts import MetricResult
from stages.runtime.text import code, heading

MAX_CELL_LENGTH = 240  # characters of an example's text in a table
SIGN = {"better": "✅ better", "worse": "❌ worse"}
# Text that begins a mention, a reference or a link on GitHub. An invisible word joiner after it prevents that.
LINKS = re.compile(r"@(?=\w)|#(?=\d)|www(?=\.)|:(?=//)", re.IGNORECASE)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border: 1px solid #d1d9e0; padding: .35rem .7rem; text-align: left; vertical-align: top }
th { background: #f6f8fa } td { font-variant-numeric: tabular-nums }
code { background: #f6f8fa; padding: .1rem .3rem; border-radius: .25rem }
td s { background: #ffebe9; color: #82071e } td strong { background: #dafbe1; color: #116329; font-weight: inherit }
img { max-width: 49% } h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .3rem }
"""


def markdown(comparison: Comparison, gates: Sequence[GateResult], curves: str) -> str:
    """The report. `curves` is Markdown: Mermaid text for GitHub, images for the page."""
    before, after = (code(side.name) for side in (comparison.before, comparison.after))
    parts = [f"# Review: {before} → {after}", f"**{headline(comparison)}**"]
    if gates:
        rows = [[text(gate.rule), "✅ passed" if gate.passed else "❌ failed", text(gate.found)] for gate in gates]
        parts += ["## Gates", table(["gate", "", "found"], rows)]
    parts += ["## Metrics on the test split", metrics_table(comparison), *map(text, comparison.notes)]
    missing = [(side.name, path) for side in (comparison.before, comparison.after) for path in sorted({*side.missing})]
    if missing:
        parts.append(missing_files(missing))
    parts += section("## Changed parameters", changed_table(comparison.params))
    parts += section("## Stages that ran again", stages_table(comparison))
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


def headline(comparison: Comparison) -> str:
    """One line: the verdict on the test loss, which training minimizes."""
    loss = comparison.metric("loss")
    if loss.difference is None:
        return f"Test loss: {loss.verdict}."
    change = f"{loss.difference.before:.4f} → {loss.difference.after:.4f}, {signed(loss.difference.value)}"
    return f"Test loss: {SIGN.get(loss.verdict, loss.verdict)}, {change} nats/token, 95% interval {interval(loss)}."


def metrics_table(comparison: Comparison) -> str:
    rows = []
    for result in comparison.metrics:
        change = "" if result.difference is None else signed(result.difference.value)
        values = ["" if value is None else f"{value:.4f}" for value in (result.before, result.after)]
        verdict = SIGN.get(result.verdict, result.verdict)
        rows.append([result.metric.name, *values, change, interval(result), verdict])
    about = (
        "Paired bootstrap over the common test examples. A metric is better or worse if the interval excludes 0 and "
        "fewer than 5% of random swaps of before and after differ as much. This compares two models, not training "
        "seeds. With six metrics, one review in four shows a difference by chance."
    )
    return table(["metric", "before", "after", "difference", "95% interval", "verdict"], rows) + "\n\n" + about


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def interval(result: MetricResult) -> str:
    difference = result.difference
    return "" if difference is None else f"{signed(difference.low)} to {signed(difference.high)}"


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
        ]
        for example in examples
    ]
    header = ["loss (nats/token)", "prompt", "reference", "answer before", "answer after"]
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


def page(content: str, title: str) -> str:
    """Markdown as an HTML page without scripts and external resources."""
    body = str(MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render(content))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
