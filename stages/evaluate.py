"""Score the answers of one model → `metrics/evaluate/<model>.json` and `data/predictions/<model>.parquet`.

The answers are those of `predict`. They are scored by the checks in the data, by comparison with the reference, and by
the functions in `scorers.py`. `replicates/SEED` is the model of a replicate, which has no metrics file.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rapidfuzz.distance import LCSseq

from stages.checks.kinds import CheckTimeoutError, passes
from stages.checks.words import words
from stages.data.examples import SCORING_SCHEMA
from stages.data.files import write_csv, write_json
from stages.data.tables import read_table, write_parquet
from stages.runtime.errors import UserError
from stages.runtime.run import run
from stages.runtime.terminal import progress, summary
from stages.scoring.metrics import METRICS, OPEN_REASONING, all_metrics, metrics_by_slice
from stages.scoring.scorers import PREFIX, SCORERS, Scorer, load_scorers, score

if TYPE_CHECKING:
    import pandas as pd

SPLITS, SCORING = ("test", "retention"), Path("data/scoring.parquet")
EXAMPLE_COLUMNS = ["example_id", "prompt_id", "source", "source_row", "slice", "prompt", "response", "truncated"]
ANSWER_COLUMNS = ["split", "example_id", "loss", "tokens", "correct_tokens", "reference_fits"]
ANSWER_COLUMNS += ["answers", "reasoning", "calls", "open_reasoning", "answer_tokens", "stopped"]
NGRAM = 4  # words of the sequences that `repetition` counts
# Values of several answers to a prompt are means over them.
PREDICTIONS_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),
        ("slice", pa.string()),
        ("loss", pa.float64()),  # mean over the example's supervised tokens, in nats
        ("tokens", pa.int64()),  # supervised tokens
        ("correct_tokens", pa.int64()),
        ("answer", pa.string()),  # the final text of the first one
        ("reasoning", pa.string()),  # of the first answer; null if it has none
        ("calls", pa.string()),  # the tool calls of the first answer; null if it has none
        ("open_reasoning", pa.float64()),  # whether the reasoning never closes, so that there is no final text
        ("num_answers", pa.int64()),
        ("answer_tokens", pa.float64()),  # without the EOS token
        ("stopped", pa.float64()),
        ("reference_fits", pa.bool_()),  # whether the whole reference with its EOS token fits into max_new_tokens
        ("checked", pa.bool_()),  # whether the row has a check
        ("passed", pa.int64()),  # the number of answers that pass it
        ("exact_match", pa.float64()),
        ("rouge_l", pa.float64()),
        ("repetition", pa.float64()),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="base, tuned or replicates/SEED")
    name = parser.parse_args().model
    predictions = Path(f"data/predictions/{name}.parquet")

    scorers = load_scorers()
    check_names(scorers)
    rows = score_answers(Path(f"data/answers/{name}.parquet"), scorers)
    schema = pa.schema([*PREDICTIONS_SCHEMA, *((PREFIX + scorer, pa.float64()) for scorer in scorers)])
    parts = dict(iter(rows.groupby("split", sort=False)))
    metrics = {split: metrics_by_slice(part) for split, part in parts.items()}
    write_parquet(predictions, rows.astype(object).where(rows.notna(), None).to_dict("records"), schema)
    wrote = [predictions]
    if "/" not in name:
        metrics_file, losses_file = (Path(f"metrics/evaluate/{name}.{suffix}") for suffix in ("json", "csv"))
        write_json(metrics_file, metrics["test"] | {split: metrics[split] for split in parts if split != "test"})
        # In the order of the test split, which is the same for base and tuned: `dvc plots` pairs the rows.
        losses = zip(parts["test"]["tokens"], parts["test"]["loss"], strict=True)
        write_csv(losses_file, f"tokens,{name}_loss", losses)
        wrote += [metrics_file, losses_file]
    summary(
        {"model": name} | {split: describe(part, metrics[split]) for split, part in parts.items()},
        wrote=wrote,
        then="make review BASE=main",
    )


def check_names(scorers: Iterable[str]) -> None:
    """Check that no scorer has the name of a metric.

    Raises:
        UserError: one has.
    """
    reserved = {
        "examples",
        "supervised_tokens",
        "perplexity",
        "slices",
        "retention",
        *(metric.name for metric in (*METRICS, OPEN_REASONING)),
    }
    for name in scorers:
        if name in reserved or name.startswith("pass_at_") or name.endswith("_se"):
            raise UserError(f"{SCORERS}: {name} is the name of a metric; rename the function")


def describe(rows: "pd.DataFrame", metrics: Mapping[str, Any]) -> str:
    """The most important metrics of a split, for the terminal."""
    shown = {name: "–" if value is None else f"{value:.3f}" for name, value in metrics.items() if name != "slices"}
    parts = [
        f"{len(rows):,} examples, loss {shown['loss']} ± {shown['loss_se']}, token accuracy {shown['token_accuracy']}",
        f"ROUGE-L {shown['rouge_l']}, stop rate {shown['stop_rate']}, repetition {shown['repetition']}",
    ]
    if rows["checked"].any():
        parts.insert(1, f"pass rate {shown['pass_rate']} over {rows['checked'].sum():,} examples with a check")
    others = [metric.name for metric in all_metrics(rows)[len(METRICS) :]]
    return ", ".join([*parts, *(f"{name} {shown[name]}" for name in others)])


def score_answers(path: Path, scorers: Mapping[str, Scorer]) -> "pd.DataFrame":
    """The predictions: the answers of a table with their scores."""
    import pandas as pd

    examples = {
        (split, row["example_id"]): row
        for split in SPLITS
        for row in read_table(Path(f"data/{split}.parquet"), EXAMPLE_COLUMNS).to_pylist()
    }
    scoring = {(row["split"], row["example_id"]): row for row in read_table(SCORING, SCORING_SCHEMA.names).to_pylist()}
    rows = []
    for row in progress(read_table(path, ANSWER_COLUMNS).to_pylist(), "score", "example"):
        key = row["split"], row["example_id"]
        rows.append(score_row(row | examples[key] | scoring[key], scorers))
    return pd.DataFrame(rows)


def score_row(row: dict[str, Any], scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    """The predictions of one example, in the order of `PREDICTIONS_SCHEMA`, and then the values of the scorers."""
    answers, is_open, reference = row["answers"], row["open_reasoning"], row["response"]
    check = json.loads(row["check"]) if row["check"] else None
    location = {name: row[name] for name in ("example_id", "source", "source_row", "slice")}
    columns = location | {"check": check} | json.loads(row["other_columns"])
    values: dict[str, list[float]] = {
        "answer_tokens": row["answer_tokens"],
        "stopped": row["stopped"],
        "open_reasoning": is_open,
        "exact_match": [answer == reference for answer in answers],
        "rouge_l": [rouge_l(answer, reference) for answer in answers],
        "repetition": [repetition(answer) for answer in answers],
    }
    where = f"{row['source']}, row {row['source_row']:,}"
    for name, scorer in scorers.items():
        of_answers = [score(name, scorer, where, row["prompt"], answer, reference, columns) for answer in answers]
        values[PREFIX + name] = [value for value in of_answers if value is not None]
    scores = row | {
        "answer": answers[0],
        "reasoning": row["reasoning"][0],
        "calls": row["calls"][0],
        "num_answers": len(answers),
        "reference_fits": row["reference_fits"] and not row["truncated"],
        "checked": check is not None,
        "passed": sum(
            not no_text and is_right(where, check, answer) for answer, no_text in zip(answers, is_open, strict=True)
        )
        if check is not None
        else 0,
        **{name: fmean(known) if known else None for name, known in values.items()},
    }
    return {name: scores[name] for name in (*PREDICTIONS_SCHEMA.names, *(PREFIX + name for name in scorers))}


def is_right(where: str, check: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer passes the check of its row; `where` names the row, for a message."""
    try:
        return passes(check, answer)
    except CheckTimeoutError as error:
        print(f"{where}: {error} for the answer {answer!r:.100}, which is counted as failed")
        return False


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: the F1 score of the longest common subsequence of words (Lin, 2004), for any language."""
    if answer == reference:  # also if there are no words
        return 1.0
    answer_words, reference_words = words(answer), words(reference)
    num_words = len(answer_words) + len(reference_words)
    return 2 * LCSseq.similarity(answer_words, reference_words) / num_words if num_words else 0.0


def repetition(answer: str) -> float:
    """The share of 4-grams of words that repeat an earlier one (seq-rep-4, Welleck et al. 2019); 0 for a short answer.

    It measures loops within an answer. The shares of distinct words of all answers would rise if answers got shorter.
    """
    answer_words = words(answer)
    grams = [tuple(answer_words[start : start + NGRAM]) for start in range(len(answer_words) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


if __name__ == "__main__":
    run(main)
