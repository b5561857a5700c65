"""Validate the scores of training rows: replace answers with bad ones, and measure which scores find them.

    python -m benchmarks.row_scores [DATA] [MODELS] [ROWS]

DATA: a file of rows with one question and one answer. MODELS: a folder with `base` and `tokenizer`. ROWS: how many rows
are used. The results of each pair are one entry of `benchmarks/row_scores.json`; the command prints all entries as
Markdown tables.
"""

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from benchmarks.data import read_examples
from benchmarks.report import markdown_table
from stages.data.examples import RAW_SCHEMA, BadRowError
from stages.data.files import read_json, write_json
from stages.data.tokenizer import load_tokenizer
from stages.download_dataset import raw_row
from stages.engine.distributed import DistributedContext
from stages.engine.loading import load_for_inference
from stages.engine.models import pick_device
from stages.format import format_batch
from stages.rows.row_parser import RowParser
from stages.rows.sources import open_files
from stages.runtime.params import FormatParams, ScoreRowsParams, load_params
from stages.score_rows import score_examples, summarize
from stages.templates.selection import load_template

RESULTS = Path(__file__).with_name("row_scores.json")
BAD = 0.15  # share of the rows whose answers are replaced by each kind
SHARES, DRAWS = (0.01, 0.05), 200  # of bad rows in a dataset, and how often they are drawn to measure the precision
REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I am not able to answer this question.",
    "I cannot assist with that request.",
]
PHRASES = [
    "Here is the answer to your question.",
    "Sure! I would be happy to help you with that.",
    "That is a great question, and there are many ways to think about it.",
]
OTHER_LANGUAGES = [
    "Das kommt auf den Zusammenhang an, und es gibt dafür mehrere gute Gründe.",
    "Heute ist das Wetter schön, und am Nachmittag gehen wir im Park spazieren.",
    "La réponse dépend du contexte et de ce que vous voulez faire exactement.",
    "Il faut d'abord lire le texte avec attention et noter les idées principales.",
    "La respuesta depende del contexto y de lo que usted quiera hacer.",
    "Primero hay que leer el texto con calma y anotar las ideas más importantes.",
]
Pair = tuple[str, str]  # the text of a question, with its input, and of its answer


def other_answer(pairs: list[Pair], at: int, choose: random.Random) -> str:
    return pairs[(at + choose.randrange(1, len(pairs))) % len(pairs)][1]


def wrong_numbers(pairs: list[Pair], at: int, choose: random.Random) -> str:
    """The answer with other digits; the number of digits stays."""
    return re.sub(r"\d", lambda digit: str((int(digit[0]) + choose.randrange(1, 10)) % 10), pairs[at][1])


def first_half(pairs: list[Pair], at: int, choose: random.Random) -> str:
    words = pairs[at][1].split(" ")
    return " ".join(words[: len(words) // 2])


KINDS: dict[str, Callable[[list[Pair], int, random.Random], str]] = {
    "the answer of another row": other_answer,
    "a refusal": lambda pairs, at, choose: choose.choice(REFUSALS),
    "an answer in another language": lambda pairs, at, choose: choose.choice(OTHER_LANGUAGES),
    "an empty phrase": lambda pairs, at, choose: choose.choice(PHRASES),
    "the first half of the answer": first_half,
    "a copy of the question": lambda pairs, at, choose: pairs[at][0],
    "wrong numbers": wrong_numbers,
}
# The higher, the worse. IFD: Li et al. 2023, From Quantity to Quality (https://arxiv.org/abs/2308.12032).
SCORES: dict[str, Callable[[pd.DataFrame], "pd.Series[float]"]] = {
    "loss": lambda rows: rows["loss"],
    "IFD": lambda rows: rows["loss"] / rows["loss_without_prompt"],
    "−PMI": lambda rows: -rows["pmi"],
    "−PMI per token": lambda rows: -rows["pmi_per_token"],
    "EOS loss": lambda rows: rows["eos_loss"],
}


def main(data: str = "data/instructions.jsonl", models: str = "models", rows: str = "400") -> None:
    results = read_json(RESULTS) if RESULTS.exists() else {}
    results[f"{Path(data).name}, {model_name(Path(models))}"] = validate(Path(data), Path(models), int(rows))
    write_json(RESULTS, dict(sorted(results.items())))
    print(tables(results))


def model_name(models: Path) -> str:
    """The model that a folder was downloaded from, without its version."""
    return re.split("[=#]", Path(read_json(models / "base/source.json")["model_name"]).name)[0]


def validate(data: Path, models: Path, num_rows: int) -> dict[str, Any]:
    """For each kind of bad answer and each score, the AUC against the other rows, and the precision at `SHARES`."""
    score = Scorer(models)
    rows = list(islice(read_rows(data), num_rows))
    pairs = [pair_of(row) for row in rows]
    good = score(rows)
    choose = random.Random(0)
    results: dict[str, Any] = {"rows": len(rows), "kinds": {}}
    for kind, replace in KINDS.items():
        replaced: dict[int, dict[str, Any]] = {}
        for at in choose.sample(range(len(rows)), len(rows)):
            answer = replace(pairs, at, choose)
            if answer.strip() and answer != pairs[at][1] and len(replaced) < BAD * len(rows):
                replaced[at] = with_answer(rows[at], answer)
        bad, others = score([*replaced.values()]), good.drop(index=[*replaced])
        results["kinds"][kind] = {"bad": len(bad)} | {
            name: measure(function(bad).dropna().to_numpy(), function(others).dropna().to_numpy())
            for name, function in SCORES.items()
        }
        print(kind, json.dumps(results["kinds"][kind]), flush=True)
    return results


def measure(bad: npt.NDArray[np.float64], good: npt.NDArray[np.float64]) -> dict[str, float]:
    """The AUC, and for each share of bad rows, how many of as many rows with the worst scores are bad, on average."""
    if not len(bad):
        return {}
    auc = float((bad[:, None] > good).mean() + (bad[:, None] == good).mean() / 2)
    random_rows, precisions = np.random.default_rng(0), {}
    for share in SHARES:
        num_bad = min(len(bad), max(1, round(share * len(good))))
        shares_found = []
        for _ in range(DRAWS):
            drawn = random_rows.choice(bad, num_bad, replace=False)
            worst = np.argsort(-np.concatenate([good, drawn]), kind="stable")[:num_bad]
            shares_found.append((worst >= len(good)).mean())
        precisions[f"precision at {share:.0%}"] = float(np.mean(shares_found))
    return {"auc": auc} | precisions


class Scorer:
    """Format rows of `RAW_SCHEMA` and score them by one model."""

    def __init__(self, models: Path):
        self.params, self.format_params = load_params(ScoreRowsParams), load_params(FormatParams)
        self.context = DistributedContext(pick_device())
        self.model = load_for_inference(models / "base", self.params.precision, self.context)
        tokenizer = load_tokenizer(models / "tokenizer")
        self.template = load_template(self.params.template, tokenizer, self.params.template_options)

    def __call__(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        """The columns of `summarize` for each row, in order."""
        numbered = [row | {"source_row": number} for number, row in enumerate(rows)]
        table = format_batch(pa.Table.from_pylist(numbered, RAW_SCHEMA), self.template, self.format_params).examples
        examples = read_examples(table)
        losses, without_prompt = score_examples(
            self.model, self.template, examples, examples, self.params, self.context
        )
        scored = [
            summarize({"truncated": truncated}, losses[example.example_id], without_prompt[example.example_id])
            for truncated, example in zip(table["truncated"].to_pylist(), examples, strict=True)
        ]
        return pd.DataFrame(scored, table["source_row"].to_pylist()).astype({"eos_loss": float})


def read_rows(data: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that are a question and its answer, as rows of `RAW_SCHEMA`."""
    source = open_files(data, "source", RowParser())
    for _, row in source.rows():
        try:
            raw = raw_row(source, row, "source") | {"source": source.name}
        except BadRowError:
            continue
        if [message["role"] for message in json.loads(raw["messages"])] == ["user", "assistant"]:
            yield raw


def pair_of(row: dict[str, Any]) -> Pair:
    question, answer = (message["content"] for message in json.loads(row["messages"]))
    return "\n".join(filter(None, [question, row["input"]])), answer


def with_answer(row: dict[str, Any], answer: str) -> dict[str, Any]:
    question, old = json.loads(row["messages"])
    return row | {"messages": json.dumps([question, old | {"content": answer}]), "check": None}


def tables(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/row-scores.md`."""
    parts = []
    for name, result in results.items():
        rows = [
            [kind, *(" / ".join(f"{value:.2f}" for value in scores[score].values()) or "–" for score in SCORES)]
            for kind, scores in result["kinds"].items()
        ]
        table = markdown_table(["answer replaced by", *SCORES], rows)
        parts.append(f"{name}, {result['rows']:,} rows:\n\n{table}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
