"""A comparison as Markdown, for a pull request, and as a page that needs nothing but itself."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from review.comparison import Changed, Comparison, ExampleChange, Verdict
from review.gates import Checked
from stages.shared.text import code, heading

LONGEST = 240  # characters of an example's text in a table
SIGN = {"better": "✅ better", "worse": "❌ worse"}
# What GitHub would turn into a mention, a reference or a link; a word joiner behind it is not seen and stops that.
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


def markdown(comparison: Comparison, gates: Sequence[Checked], curves: str) -> str:
    """The report; `curves` is the Markdown that shows them, which differs from place to place."""
    before, after = (code(side.name) for side in (comparison.before, comparison.after))
    parts = [f"# Review: {before} → {after}", f"**{headline(comparison)}**"]
    if gates:
        rows = [[text(gate.rule), "✅ holds" if gate.holds else "❌ broken", text(gate.found)] for gate in gates]
        parts += ["## Gates", table(["gate", "", "found"], rows)]
    parts += ["## Metrics on the test split", metrics_table(comparison), *map(text, comparison.notes)]
    missing = [(side.name, path) for side in (comparison.before, comparison.after) for path in sorted({*side.missing})]
    if missing:
        parts.append(missing_words(missing))
    parts += section("## Changed parameters", changed_table(comparison.params))
    parts += section("## Stages that ran again", stages_table(comparison))
    parts += section("## Other metrics that changed", changed_table(comparison.other_metrics))
    parts += section("## Curves", curves)
    parts += section("## Sample answers", samples_table(comparison.samples))
    gained = [example for example in comparison.examples if example.change < 0]
    lost = [example for example in comparison.examples if example.change > 0]
    parts += section("## Test examples that gained most", examples_table(gained))
    parts += section("## Test examples that lost most", examples_table(lost))
    return "\n\n".join(parts) + "\n"


def section(title: str, content: str) -> list[str]:
    return [title, content] if content else []


def headline(comparison: Comparison) -> str:
    """One line: the verdict on the test loss, which is what training lowers."""
    loss = comparison.verdict("loss")
    if loss.difference is None:
        return f"Test loss: {loss.words}."
    change = f"{loss.difference.before:.4f} → {loss.difference.after:.4f}, {signed(loss.difference.value)}"
    return f"Test loss: {SIGN.get(loss.words, loss.words)}, {change} nats a token, 95 % interval {interval(loss)}."


def metrics_table(comparison: Comparison) -> str:
    rows = []
    for verdict in comparison.verdicts:
        change = "" if verdict.difference is None else signed(verdict.difference.value)
        values = ["" if value is None else f"{value:.4f}" for value in (verdict.before, verdict.after)]
        rows.append([verdict.metric.name, *values, change, interval(verdict), SIGN.get(verdict.words, verdict.words)])
    about = (
        "Paired bootstrap over the test examples that both evaluated; better or worse is said where the interval "
        "leaves out 0 and fewer than 5 % of random swaps of before and after differ as much. That tells whether these "
        "two models differ, not whether a run with another seed would; and of six metrics, one in four reviews shows "
        "one that differs by chance."
    )
    return table(["metric", "before", "after", "difference", "95 % interval", "verdict"], rows) + "\n\n" + about


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def interval(verdict: Verdict) -> str:
    difference = verdict.difference
    return "" if difference is None else f"{signed(difference.low)} to {signed(difference.high)}"


def missing_words(missing: Sequence[tuple[str, str]]) -> str:
    listed = ", ".join(f"{code(path)} of {code(revision)}" for revision, path in missing)
    paths = " ".join(sorted({path for _, path in missing}))
    return (
        f"**Not to be had here**: {listed}. They lie neither in git nor in DVC's cache here. Get them with "
        f"{code(f'dvc pull --all-commits {paths}')}, those of an experiment with {code('dvc exp pull')}, where a "
        f"remote has them; else {code('dvc repro')} in a checkout of that revision makes them again."
    )


def changed_table(changes: Sequence[Changed]) -> str:
    rows = [[code(change.name), value(change.before), value(change.after)] for change in changes]
    return table(["name", "before", "after"], rows) if rows else ""


def value(content: Any) -> str:
    return "" if content is None else code(f"{content:.6g}" if isinstance(content, float) else content)


def stages_table(comparison: Comparison) -> str:
    rows = [
        [code(stage.name), ", ".join(map(code, stage.because)), ", ".join(map(code, stage.changed)) or "the same"]
        for stage in comparison.stages
    ]
    return table(["stage", "because of", "outputs that changed"], rows) if rows else ""


def samples_table(samples: Sequence[Changed]) -> str:
    rows = [[text(sample.name), *marked(sample.before, sample.after)] for sample in samples]
    return table(["prompt", "before", "after"], rows) if rows else ""


def examples_table(examples: Sequence[ExampleChange]) -> str:
    rows = [
        [
            f"{signed(example.change)} ({example.loss_before:.2f} → {example.loss_after:.2f})",
            text(cut(example.prompt)),
            text(cut(example.reference)),
            *marked(cut(example.answer_before), cut(example.answer_after)),
        ]
        for example in examples
    ]
    header = ["loss, nats a token", "prompt", "reference", "answer before", "answer after"]
    return table(header, rows) if rows else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cut(content: str) -> str:
    return content if len(content) <= LONGEST else content[:LONGEST] + " …"


def text(content: str) -> str:
    """Foreign words as words, in a cell of a table: no markup, no mention, no link; line ends as signs."""
    return LINKS.sub("\\g<0>\N{WORD JOINER}", heading(one_line(content)))


def one_line(content: str) -> str:
    return re.sub(r"\s*\n\s*", " ⏎ ", content.strip())


def marked(before: str | None, after: str | None) -> tuple[str, str]:
    """Both texts, words that only one has struck through before and in bold after."""
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
    """`content`, Markdown, as HTML without scripts and without anything from elsewhere."""
    body = str(MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render(content))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
