"""One model on the test split → `metrics/evaluate/<model>.json`, and a row for each example in `data/predictions/`."""

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

from stages.shared.errors import UserError
from stages.shared.examples import Example, read_split
from stages.shared.files import read_table, write_csv, write_json, write_parquet
from stages.shared.masking import load_tokenizer
from stages.shared.params import EvaluateParams, load_params
from stages.shared.run import run
from stages.shared.templates import load_template
from stages.shared.terminal import bar, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.shared.batches import Batches

TEST = Path("data/test.parquet")
TOKENS_PER_MICRO_BATCH = 2048
LARGEST_LOSS = 100  # nats a token; to guess among all tokens costs about 10
PREDICTIONS = pa.schema(
    [
        ("example_id", pa.string()),
        ("loss", pa.float64()),  # mean over the example's supervised tokens, in nats
        ("tokens", pa.int64()),  # supervised ones
        ("correct_tokens", pa.int64()),
        ("answer", pa.string()),
        ("answer_tokens", pa.int64()),  # without the stop token
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

    from stages.shared.decoding import generate_answers
    from stages.shared.loss import choose_batches
    from stages.shared.models import autocast, load_model

    examples = read_split(TEST)
    model, tokenizer = load_model(Path("models") / name).eval(), load_tokenizer()
    batches, reason = choose_batches(model, examples, TOKENS_PER_MICRO_BATCH)
    print(f"Engine: {reason}", flush=True)
    prompts = [example.input_ids[: example.last_response].tolist() for example in examples]
    stop = load_template(params.template, tokenizer).end_token_id
    with autocast(params.precision, model.device):
        scores = score_tokens(model, batches, examples)
        answers = generate_answers(model, tokenizer, prompts, stop, params.max_new_tokens)

    table = read_table(TEST, ["response", "source"])
    references, sources = (column.to_pylist() for column in table.columns)
    rows = [
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
    metrics: dict[str, Any] = summarise(rows)
    if len(set(sources)) > 1:
        metrics["sources"] = {
            name: summarise([row for row, source in zip(rows, sources, strict=True) if source == name])
            for name in sorted(set(sources))
        }
    write_parquet(Path(f"data/predictions/{name}.parquet"), rows, PREDICTIONS)
    write_json(Path(f"metrics/evaluate/{name}.json"), metrics)
    losses = ((row["tokens"], row["loss"]) for row in rows)  # in the order of the test split, for base and tuned alike
    write_csv(Path(f"metrics/evaluate/{name}.csv"), f"tokens,{name}_loss", losses)
    summary(
        {
            "model": f"{name}, {len(rows):,} test examples, {metrics['supervised_tokens']:,} supervised tokens",
            "loss": f"{metrics['loss']:.3f} ± {metrics['loss_se']:.3f}, token accuracy {metrics['token_accuracy']:.3f}",
            "answers": f"ROUGE-L {metrics['rouge_l']:.3f}, exact match {metrics['exact_match']:.3f}, "
            f"stop rate {metrics['stop_rate']:.3f}, {metrics['mean_response_tokens']:.1f} tokens in the mean",
        },
        wrote=[f"data/predictions/{name}.parquet", f"metrics/evaluate/{name}.json", f"metrics/evaluate/{name}.csv"],
        then="make review BASE=main",
    )


@dataclass(frozen=True)
class Score:
    """Sums over the supervised tokens of one example: loss in nats, tokens, tokens where the likeliest was right."""

    loss_sum: float
    num_tokens: int
    num_correct: int


def score_tokens(model: "PreTrainedModel", batches: "Batches", examples: list[Example]) -> list[Score]:
    """The scores of the examples, in their order. Memory holds one micro-batch's logits."""
    import torch

    from stages.shared.loss import token_losses

    scores: dict[str, Score] = {}
    with torch.inference_mode():
        for batch in bar(batches.cut(examples), "score", "micro-batch"):
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

    def words(text: str) -> str:  # of any alphabet; the default drops all but a to z
        return re.sub(r"[\W_]+", " ", text.lower())

    return float(rouge_score(answer, reference, rouge_keys="rougeL", normalizer=words)["rougeL_fmeasure"])


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of the test split. Loss and accuracy are over all its supervised tokens, with their standard errors."""
    tokens = np.array([row["tokens"] for row in rows], float)
    loss, loss_se = ratio(np.array([row["loss"] * row["tokens"] for row in rows]), tokens)
    if not loss < LARGEST_LOSS:
        raise UserError(f"the loss is {loss:g} nats a token; this model is broken, or diverged: lower learning_rate")
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

    Tokens of one example are not independent: a standard error over tokens would be too small. This is the ratio
    estimator (Cochran, Sampling Techniques, 1977, ch. 6). sums and counts: (examples,).
    """
    value = float(sums.sum() / counts.sum())
    num = len(counts)
    if num < 2:
        return value, 0.0
    residuals = sums - value * counts
    return value, float(math.sqrt((residuals**2).sum() * num / (num - 1)) / counts.sum())


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def distinct_2(answers: Iterable[str]) -> float:
    """Different pairs of neighbouring words ÷ all pairs, over all answers (Li et al., 2016). 0 where there are none."""
    pairs = [pair for answer in answers for pair in pairwise(answer.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


if __name__ == "__main__":
    run(main)
