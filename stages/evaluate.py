"""Score one model on the test split → `metrics/evaluate/<model>.json` and `data/predictions/<model>.parquet`."""

import argparse
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.data.examples import Example, read_split
from stages.data.masking import load_tokenizer
from stages.data.tables import read_table, write_parquet
from stages.data.templates import load_template
from stages.runtime.errors import UserError
from stages.runtime.files import write_csv, write_json
from stages.runtime.params import EvaluateParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import progress, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.engine.batches import Batches

TEST = Path("data/test.parquet")
TOKENS_PER_MICRO_BATCH = 2048
MAX_LOSS = 100  # nats/token; a uniform guess over the vocabulary has about 10
PREDICTIONS_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("loss", pa.float64()),  # mean over the example's supervised tokens, in nats
        ("tokens", pa.int64()),  # supervised tokens
        ("correct_tokens", pa.int64()),
        ("answer", pa.string()),
        ("answer_tokens", pa.int64()),  # without the EOS token
        ("stopped", pa.bool_()),
        ("exact_match", pa.bool_()),
        ("rouge_l", pa.float64()),
    ]
)


def main() -> None:
    params = load_params(EvaluateParams)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["base", "tuned"])
    name = parser.parse_args().model
    predictions = Path(f"data/predictions/{name}.parquet")
    metrics_file, losses_file = (Path(f"metrics/evaluate/{name}.{suffix}") for suffix in ("json", "csv"))

    examples = read_split(TEST)
    references, sources = (column.to_pylist() for column in read_table(TEST, ["response", "source"]).columns)
    rows = predict(Path("models") / name, examples, references, params)
    metrics: dict[str, Any] = compute_metrics(rows)
    if len(set(sources)) > 1:
        metrics["sources"] = {
            source: compute_metrics([row for row, own in zip(rows, sources, strict=True) if own == source])
            for source in sorted(set(sources))
        }
    write_parquet(predictions, rows, PREDICTIONS_SCHEMA)
    write_json(metrics_file, metrics)
    # In the order of the test split, which is the same for base and tuned: `dvc plots` pairs the rows.
    write_csv(losses_file, f"tokens,{name}_loss", ((row["tokens"], row["loss"]) for row in rows))
    summary(
        {
            "model": f"{name}, {len(rows):,} test examples, {metrics['supervised_tokens']:,} supervised tokens",
            "loss": f"{metrics['loss']:.3f} ± {metrics['loss_se']:.3f}, token accuracy {metrics['token_accuracy']:.3f}",
            "answers": f"ROUGE-L {metrics['rouge_l']:.3f}, exact match {metrics['exact_match']:.3f}, "
            f"stop rate {metrics['stop_rate']:.3f}, {metrics['mean_response_tokens']:.1f} tokens on average",
        },
        wrote=[predictions, metrics_file, losses_file],
        then="make review BASE=main",
    )


def predict(
    folder: Path, examples: list[Example], references: list[str], params: EvaluateParams
) -> list[dict[str, Any]]:
    """A row of `PREDICTIONS_SCHEMA` for each example: its loss, and its greedy answer compared with the reference."""
    from stages.engine.decoding import generate_answers
    from stages.engine.loss import choose_batches
    from stages.engine.models import autocast, load_model

    model, tokenizer = load_model(folder).eval(), load_tokenizer()
    batches, reason = choose_batches(model, examples, TOKENS_PER_MICRO_BATCH)
    print(f"Engine: {reason}", flush=True)
    prompts = [example.input_ids[: example.last_response].tolist() for example in examples]
    eos_token_id = load_template(params.template, tokenizer).eos_token_id
    with autocast(params.precision, model.device):
        scores = score_tokens(model, batches, examples)
        answers = generate_answers(model, tokenizer, prompts, eos_token_id, params.max_new_tokens)
    return [
        {
            "example_id": example.example_id,
            "loss": score.loss_sum / score.num_tokens,
            "tokens": score.num_tokens,
            "correct_tokens": score.num_correct,
            "answer": answer.text,
            "answer_tokens": answer.num_tokens,
            "stopped": answer.stopped,
            "exact_match": answer.text == reference,
            "rouge_l": rouge_l(answer.text, reference),
        }
        for example, score, answer, reference in zip(examples, scores, answers, references, strict=True)
    ]


@dataclass(frozen=True)
class Score:
    """Sums over the supervised tokens of one example: loss in nats, tokens, tokens whose prediction was correct."""

    loss_sum: float
    num_tokens: int
    num_correct: int


def score_tokens(model: "PreTrainedModel", batches: "Batches", examples: list[Example]) -> list[Score]:
    """The scores of the examples, in their order. Only one micro-batch is in memory at a time."""
    import torch

    from stages.engine.loss import token_losses

    scores: dict[str, Score] = {}
    with torch.inference_mode():
        for batch in progress(batches.micro_batches(examples), "score", "micro-batch"):
            lengths = [example.num_supervised for example in batch.examples]
            result = token_losses(model, batch)
            parts = zip(
                batch.examples, result.losses.double().split(lengths), result.correct.split(lengths), strict=True
            )
            for example, losses, correct in parts:
                scores[example.example_id] = Score(losses.sum().item(), len(losses), int(correct.sum()))
    return [scores[example.example_id] for example in examples]


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin, 2004), in [0, 1]."""
    from torchmetrics.functional.text import rouge_score

    def words(text: str) -> str:  # in any alphabet; the default keeps only a to z
        return re.sub(r"[\W_]+", " ", text.lower())

    return float(rouge_score(answer, reference, rouge_keys="rougeL", normalizer=words)["rougeL_fmeasure"])


def compute_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of the test split. Loss and accuracy are means over all supervised tokens, with standard errors."""
    tokens = np.array([row["tokens"] for row in rows], float)
    loss, loss_se = ratio(np.array([row["loss"] * row["tokens"] for row in rows]), tokens)
    if not loss < MAX_LOSS:
        raise UserError(
            f"the loss is {loss:g} nats/token: training diverged, or the model is broken; lower learning_rate"
        )
    accuracy, accuracy_se = ratio(np.array([row["correct_tokens"] for row in rows], float), tokens)
    return {
        "examples": len(rows),
        "supervised_tokens": int(tokens.sum()),
        "loss": loss,
        "loss_se": loss_se,
        "perplexity": math.exp(loss),
        "perplexity_se": math.exp(loss) * loss_se,  # delta method
        "token_accuracy": accuracy,
        "token_accuracy_se": accuracy_se,
        "exact_match": mean(row["exact_match"] for row in rows),
        "rouge_l": mean(row["rouge_l"] for row in rows),
        "stop_rate": mean(row["stopped"] for row in rows),
        "mean_response_tokens": mean(row["answer_tokens"] for row in rows),
        "distinct_2": distinct_2(row["answer"] for row in rows),
    }


def ratio(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> tuple[float, float]:
    """sums / counts over all examples, and its standard error with the example as the sampling unit.

    Tokens of one example are not independent, so a standard error over tokens would be too small. This is the ratio
    estimator (Cochran, Sampling Techniques, 1977, ch. 6). sums and counts: (examples,).
    """
    value = float(sums.sum() / counts.sum())
    num_examples = len(counts)
    if num_examples < 2:
        return value, 0.0
    residuals = sums - value * counts
    return value, float(math.sqrt((residuals**2).sum() * num_examples / (num_examples - 1)) / counts.sum())


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def distinct_2(answers: Iterable[str]) -> float:
    """Distinct pairs of adjacent words ÷ all pairs, over all answers (Li et al., 2016); 0 if there are none."""
    pairs = [pair for answer in answers for pair in pairwise(answer.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


if __name__ == "__main__":
    run(main)
