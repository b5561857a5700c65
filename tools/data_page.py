"""Write `data.html`, a page that shows the data of the last `dvc repro`.

`make data BASE=main` also shows what changed since a branch, commit or experiment.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from review.data_changes import CHANGES, SPLITS, changed_data, without_template
from review.revisions import WORKSPACE, Revision, output_hashes
from stages.data.files import read_json, write_text
from stages.data.tokenizer import load_tokenizer
from stages.format import METRICS as FORMAT_METRICS
from stages.runtime.errors import UserError
from stages.runtime.params import FormatParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary
from stages.split import METRICS as SPLIT_METRICS
from stages.split import SCORES
from stages.text import printable
from tools import data_findings as findings
from tools.data_examples import choose_examples, describe_cut, show_tokens
from tools.data_tables import LOCATION, SHOWN, TOKENS, Tables, read_tables, take_raw, take_rows

PAGE, SOURCE = Path("data.html"), Path("data/source.json")
STAGES = ("download_dataset", "download_model", "format", "score_rows", "split")  # the page shows their results
NUM_BARS = 40  # of a histogram
MAX_LINES = 100  # of a table, such as sources and slices
NUM_CUTS, NUM_REJECTED = 3, 2  # truncated rows; rejected rows per reason


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.data_page", description=__doc__)
    parser.add_argument("--base", help="branch, tag, commit or experiment whose data is compared")
    options = parser.parse_args()
    max_length = load_params(FormatParams).max_length
    changes = compare(options.base) if options.base is not None else None
    outdated = sorted({line.partition(":")[0] for line in Revision(WORKSPACE).outdated()} & {*STAGES})
    context = collect(read_tables(), max_length)
    write_text(PAGE, render(context | {"changes": changes, "outdated": outdated}))
    lines = {"outdated": f"{', '.join(outdated)}; run `dvc repro`"} if outdated else {}
    lines |= {entry["name"]: entry["text"] for entry in context["overview"]}
    summary(lines, wrote=[PAGE], then=f"open {PAGE} in a browser; docs/looking-at-data.md explains it")


def collect(tables: Tables, max_length: int) -> dict[str, Any]:
    """What the page shows, without the changes against a revision."""
    for path in (SOURCE, FORMAT_METRICS, SPLIT_METRICS):
        if not path.exists():
            raise UserError(f"{path}: not found; run `dvc repro`, which writes it")
    used = tables.used
    found = {
        "repeated": findings.repeated_answers(used),
        "contradictions": findings.contradictions(used),
        **findings.near_duplicates(tables),
        "checks": findings.failing_checks(read_json(FORMAT_METRICS).get("checks_failing_own_answer", 0)),
        **findings.score_ends(tables),
    }
    languages = findings.languages(tables)
    examples = choose_examples(tables)
    lengths = tables.rows["prompt_tokens"] + tables.rows["answer_tokens"]
    cut = lengths[used.index[used["truncated"]]].sort_values(ascending=False, kind="stable").index[:NUM_CUTS]
    groups = [group for finding in (*found.values(), languages.mixed) for group in finding.groups]
    shown = [row for group in groups for row in group.rows] + [row for _, _, row in languages.counts]
    rows, whole = take_rows(shown, SHOWN), take_rows([*examples, *cut], SHOWN + TOKENS)
    tokenizer = load_tokenizer()
    num_truncated = len(tables.rows[tables.rows["truncated"]].drop_duplicates(LOCATION))
    context = {
        "origins": count_origins(tables),
        "reasons": rejected_reasons(tables.rejected),
        "source": read_json(SOURCE),
        "split": read_json(SPLIT_METRICS),
        "max_length": max_length,
        "num_truncated": num_truncated,
        "num_rejected": {
            name: int((tables.rejected["reason"] == name).sum()) for name in ("too_long", "prompt_too_long")
        },
        "kept": read_json(FORMAT_METRICS)["max_length_to_keep"],
        "histograms": {
            "prompt and answer": histogram(lengths, max_length),
            "prompt": histogram(tables.rows["prompt_tokens"], max_length),
            "answer": histogram(tables.rows["answer_tokens"], max_length),
        },
        "cuts": [describe_cut(tokenizer, whole[row], int(lengths[row])) for row in cut],
        "examples": [show_tokens(tokenizer, whole[row], kinds) for row, kinds in examples.items()],
        "languages": languages,
        "found": found,
        "rows": rows,
        "splits": {row: tables.rows["split"][row] for row in rows},
        "scores": tables.scores is not None and {"path": SCORES, "num_rows": len(tables.scores)},
    }
    return context | {"overview": overview(tables, context)}


def overview(tables: Tables, context: dict[str, Any]) -> list[dict[str, Any]]:
    """The main results: the section, a name, a text, and whether there is something to look at."""
    taken = len(tables.rows.drop_duplicates(LOCATION))
    rejected, truncated, found = len(tables.rejected), context["num_truncated"], context["found"]
    lengths = f"{truncated:,} of {taken:,} rows ({truncated / taken:.1%}) at max_length = {context['max_length']:,}"
    lengths += f"; {context['kept']['99%']:,} keeps 99% whole"
    entries = [
        ("rows", "rows", f"{taken + rejected:,} read, {taken:,} taken, {rejected:,} rejected", bool(rejected)),
        ("lengths", "truncated", lengths, bool(truncated)),
    ]
    nouns = {
        "contradictions": ("contradictions", "prompts with different answers"),
        "repeated": ("repeated answers", "answers that several rows have"),
        "across": ("across splits", "groups of near-duplicates"),
        "within": ("within train", "groups of near-duplicates"),
        "checks": ("checks", "rows whose own answer fails"),
        "independent": ("scores", "rows whose answer does not depend on the question"),
        "copied": ("scores, copies", "rows whose answer copies the question"),
        "early end": ("scores, ends", "rows whose answer ends early"),
    }
    for kind, (name, noun) in nouns.items():
        if finding := found.get(kind):
            in_rows = f", in {finding.num_rows:,} rows" if finding.num_rows != finding.count else ""
            entries.append((kind, name, f"{noun}: {finding.count:,}{in_rows}", bool(finding.count)))
    return [dict(zip(("section", "name", "text", "is_notable"), entry, strict=True)) for entry in entries]


def count_origins(tables: Tables) -> pd.DataFrame:
    """The number of rows of each source and slice: read, rejected, taken, truncated, and examples in each split."""
    by = ["source", "slice"]
    taken = tables.rows.drop_duplicates(LOCATION)
    counts = pd.DataFrame(
        {
            "rejected": tables.rejected.groupby(by).size(),
            "taken": taken.groupby(by).size(),
            "truncated": tables.rows[tables.rows["truncated"]].drop_duplicates(LOCATION).groupby(by).size(),
            **{name: rows.groupby(by).size() for name, rows in tables.rows.groupby("split")},
        }
    ).reindex(columns=["read", "rejected", "taken", "truncated", *SPLITS, "duplicate", "left out"])
    counts = counts.fillna(0).astype(int)
    counts["read"] = counts["rejected"] + counts["taken"]
    return counts.reset_index()


def rejected_reasons(rejected: pd.DataFrame) -> list[dict[str, Any]]:
    """The reasons for rejecting rows, the most frequent first, with examples."""
    examples = rejected.groupby(["reason"], sort=False).head(NUM_REJECTED).to_dict("records")
    messages = take_raw({(row["source"], row["source_row"]) for row in examples})
    return [
        {
            "reason": reason,
            "count": count,
            "examples": [
                row | {"text": messages.get((row["source"], row["source_row"]))}
                for row in examples
                if row["reason"] == reason
            ],
        }
        for reason, count in rejected["reason"].value_counts().items()
    ]


def histogram(lengths: pd.Series, max_length: int) -> dict[str, Any]:
    """The bars of a histogram, and the place of `max_length` in it; heights and places in percent.

    The last bar has all longer examples, so that a few of them do not squeeze the others.
    """
    end = int(max(np.quantile(lengths, 0.995, method="inverted_cdf"), min(max_length, lengths.max()), NUM_BARS))
    step = -(-end // NUM_BARS)
    counts = np.bincount(np.minimum(lengths // step, NUM_BARS), minlength=NUM_BARS + 1)
    place = max_length / step / (NUM_BARS + 1)
    return {
        "bars": [
            {"from": bar * step, "is_last": bar == NUM_BARS, "count": count, "height": 100 * count / int(counts.max())}
            for bar, count in enumerate(counts.tolist())
        ],
        "step": step,
        "highest": int(counts.max()),
        "end": NUM_BARS * step,
        "place": min(100 * place, 100),
        "is_beyond": place > 1,
        "median": int(lengths.median()),
        "longest": int(lengths.max()),
    }


def compare(base: str) -> dict[str, Any]:
    """The number of rows of each split and source before and after, and the rows that differ."""
    before, after = Revision(base), Revision(WORKSPACE)
    # The tables in the workspace are compared, also those that dvc.lock does not describe.
    hashes = [output_hashes(before.read_yaml("dvc.lock")), dict.fromkeys(SPLITS.values(), WORKSPACE)]
    data = changed_data(before, after, hashes)
    counts = {}
    for name, side in (("before", before), ("after", after)):
        tables = {split: side.read_table(path, ["source"]) for split, path in SPLITS.items()}
        rows = [table.assign(split=split) for split, table in tables.items() if table is not None]
        counts[name] = pd.concat(rows).groupby(["split", "source"]).size() if rows else pd.Series(dtype=int)
    return {
        "base": base,
        "is_known": data.is_known,
        "missing": before.missing | after.missing,
        "counts": pd.DataFrame(counts).fillna(0).astype(int).reset_index(),
        "changed": data.counts("split"),
        "examples": {change: data.examples(change) for change in CHANGES},
    }


def render(context: dict[str, Any]) -> str:
    """The page. All text is escaped, and control characters are made visible."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Not `isinstance`: what a macro returns is a subclass of `str`, and is markup.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"number": "{:,}".format, "without_template": without_template}
    constants = {"limits": findings, "changes_of": CHANGES, "max_lines": MAX_LINES}
    return environment.get_template("data.html").render(context | constants)


if __name__ == "__main__":
    run(main, exclusive=False)
