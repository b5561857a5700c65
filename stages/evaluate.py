"""Score one model on the test split → `metrics/evaluate/<model>.json` and `data/predictions/<model>.parquet`."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.data.checks import CheckTimeoutError, passes
from stages.data.examples import Example, read_split
from stages.data.masking import load_tokenizer
from stages.data.tables import read_table, write_parquet
from stages.data.templates import load_template
from stages.data.words import words
from stages.runtime.errors import UserError
from stages.runtime.files import write_csv, write_json
from stages.runtime.params import EvaluateParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import progress, summary

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from stages.engine.batches import Batches
    from stages.engine.distributed import DistributedContext

TEST = Path("data/test.parquet")
SCORED_TOKENS = 2  # per token of a micro-batch in training; no activations are kept for a backward pass
MAX_LOSS = 100  # nats/token; a uniform guess over the vocabulary has about 10
NGRAM = 4  # words of the sequences that `repetition` counts
PREDICTIONS_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("slice", pa.string()),
        ("loss", pa.float64()),  # mean over the example's supervised tokens, in nats
        ("tokens", pa.int64()),  # supervised tokens
        ("correct_tokens", pa.int64()),
        ("answer", pa.string()),
        ("answer_tokens", pa.int64()),  # without the EOS token
        ("stopped", pa.bool_()),
        ("reference_fits", pa.bool_()),  # whether the reference with its EOS token fits into max_new_tokens
        ("checked", pa.bool_()),  # whether the row has a check
        ("passed", pa.bool_()),  # whether it has one that the answer passes
        ("exact_match", pa.bool_()),
        ("rouge_l", pa.float64()),
        ("repetition", pa.float64()),
    ]
)
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A sum over examples ÷ a count, such as loss ÷ supervised tokens.

    direction: 1 if higher is better, −1 if lower is better, 0 if neither.
    sums, counts: of each example.
    columns: those of the predictions that sums and counts are computed from.
    """

    name: str
    direction: int
    sums: Callable[["pd.DataFrame"], "pd.Series[Any]"]
    counts: Callable[["pd.DataFrame"], "pd.Series[Any]"]
    columns: tuple[str, ...]


def per_example(name: str, direction: int, column: str) -> Metric:
    """The mean of a column over examples."""
    return Metric(name, direction, lambda rows: rows[column], lambda rows: rows[column] * 0 + 1, (column,))


METRICS = (
    Metric("loss", -1, lambda rows: rows["loss"] * rows["tokens"], lambda rows: rows["tokens"], ("loss", "tokens")),
    Metric(
        "token_accuracy",
        1,
        lambda rows: rows["correct_tokens"],
        lambda rows: rows["tokens"],
        ("correct_tokens", "tokens"),
    ),
    Metric("pass_rate", 1, lambda rows: rows["passed"], lambda rows: rows["checked"], ("passed", "checked")),
    per_example("exact_match", 1, "exact_match"),
    per_example("rouge_l", 1, "rouge_l"),
    # An answer can't be as long as a reference that does not fit into max_new_tokens, so those are not counted.
    Metric(
        "stop_rate",
        1,
        lambda rows: rows["stopped"] * rows["reference_fits"],
        lambda rows: rows["reference_fits"],
        ("stopped", "reference_fits"),
    ),
    per_example("repetition", -1, "repetition"),
    per_example("mean_response_tokens", 0, "answer_tokens"),
)


def main() -> None:
    params = load_params(EvaluateParams)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["base", "tuned"])
    name = parser.parse_args().model
    predictions = Path(f"data/predictions/{name}.parquet")
    metrics_file, losses_file = (Path(f"metrics/evaluate/{name}.{suffix}") for suffix in ("json", "csv"))

    from stages.engine.distributed import init_distributed

    context = init_distributed()
    if context.sharded:
        print(f"Launcher: {params.launcher}: {context}")
    rows = predict(Path("models") / name, params, context) if context.is_needed_for_inference else None
    context.shutdown()
    if rows is None or not context.is_main_process:
        return
    metrics = compute_metrics(rows)
    slices = {value: compute_metrics(part) for value, part in rows.groupby("slice")}
    write_parquet(predictions, rows.to_dict("records"), PREDICTIONS_SCHEMA)
    write_json(metrics_file, metrics | ({"slices": slices} if len(slices) > 1 else {}))
    # In the order of the test split, which is the same for base and tuned: `dvc plots` pairs the rows.
    write_csv(losses_file, f"tokens,{name}_loss", zip(rows["tokens"], rows["loss"], strict=True))
    shown = {key: "–" if value is None else f"{value:.3f}" for key, value in metrics.items()}
    checks = f"pass rate {shown['pass_rate']}, over {rows['checked'].sum():,} examples with a check"
    summary(
        {
            "model": f"{name}, {len(rows):,} test examples, {rows['tokens'].sum():,} supervised tokens",
            "loss": f"{shown['loss']} ± {shown['loss_se']}, token accuracy {shown['token_accuracy']}",
            **({"checks": checks} if rows["checked"].any() else {}),
            "answers": f"ROUGE-L {shown['rouge_l']}, exact match {shown['exact_match']}, repetition "
            f"{shown['repetition']}, stop rate {shown['stop_rate']}, {shown['mean_response_tokens']} tokens on average",
        },
        wrote=[predictions, metrics_file, losses_file],
        then="make review BASE=main",
    )


def predict(folder: Path, params: EvaluateParams, context: "DistributedContext") -> "pd.DataFrame":
    """The columns of `PREDICTIONS_SCHEMA` for each test example: its loss, and its greedy answer.

    If the weights are sharded, all ranks compute the same.

    Raises:
        UserError: the loss is far above that of a random guess, or not a number.
    """
    import pandas as pd

    from stages.engine.decoding import generate_answers, generation_settings
    from stages.engine.loading import load_for_inference
    from stages.engine.models import autocast
    from stages.engine.probe import choose_batches

    examples = read_split(TEST)
    test = read_table(TEST, ["example_id", "prompt_id", "slice", "response", "check"])
    model, tokenizer = load_for_inference(folder, params.precision, context), load_tokenizer()
    tokens_per_batch = SCORED_TOKENS * params.tokens_per_batch
    batches, messages, _ = choose_batches(model, examples, tokens_per_batch, params.precision)
    print(*messages, sep="\n", flush=True)
    prompts = [example.input_ids[: example.last_response].tolist() for example in examples]
    settings = generation_settings(load_template(params.template, tokenizer).eos_token_ids, params.max_new_tokens)
    with autocast(params.precision, model.device, cache_enabled=not context.sharded):
        scores = score_tokens(model, batches, examples)
        answers = generate_answers(model, tokenizer, prompts, settings, params.tokens_per_batch)
    rows = [
        {
            "loss": score.loss_sum / score.num_tokens,
            "tokens": score.num_tokens,
            "correct_tokens": score.num_correct,
            "answer": answer.text,
            "answer_tokens": answer.num_tokens,
            "stopped": answer.stopped,
            "reference_fits": len(example.input_ids) - example.last_response <= params.max_new_tokens,
            "checked": check is not None,
            "passed": check is not None and is_right(example.example_id, check, answer.text),
            "exact_match": answer.text == reference,
            "rouge_l": rouge_l(answer.text, reference),
            "repetition": repetition(answer.text),
        }
        for example, score, answer, reference, check in zip(
            examples, scores, answers, test["response"].to_pylist(), test["check"].to_pylist(), strict=True
        )
    ]
    table = pd.concat([test.drop_columns(["response", "check"]).to_pandas(), pd.DataFrame(rows)], axis=1)
    loss = (table["loss"] * table["tokens"]).sum() / table["tokens"].sum()
    if not loss < MAX_LOSS:
        raise UserError(
            f"the loss is {loss:g} nats/token: training diverged, or the model is broken; lower learning_rate"
        )
    return table


@dataclass(frozen=True)
class Score:
    """Sums over the supervised tokens of one example: loss in nats, tokens, tokens whose prediction was correct."""

    loss_sum: float
    num_tokens: int
    num_correct: int


def score_tokens(model: "PreTrainedModel", batches: "Batches", examples: Sequence[Example]) -> list[Score]:
    """The scores of the examples, in their order. Only one micro-batch is in memory at a time."""
    import torch

    from stages.engine.loss import losses_by_example

    scores: dict[str, Score] = {}
    micro_batches = progress(batches.micro_batches(examples), "score", "micro-batch")
    with torch.inference_mode():
        for example, result in losses_by_example(model, micro_batches):
            losses = result.losses.cpu().double()
            scores[example.example_id] = Score(losses.sum().item(), len(losses), int(result.correct.sum()))
    return [scores[example.example_id] for example in examples]


def compute_metrics(rows: "pd.DataFrame") -> dict[str, Any]:
    """All metrics with their standard errors; None if no example counts, or for the standard error of a single one."""
    metrics: dict[str, Any] = {"examples": len(rows), "supervised_tokens": int(rows["tokens"].sum())}
    for metric in METRICS:
        by_prompt = (
            cells(rows).astype(float).groupby(rows["prompt_id"]).sum() for cells in (metric.sums, metric.counts)
        )
        value, error = ratio(*(cells.to_numpy() for cells in by_prompt))
        metrics |= {metric.name: value, f"{metric.name}_se": error}
        if metric.name == "loss" and value is not None and value < MAX_LOSS:
            perplexity = math.exp(value)
            metrics |= {"perplexity": perplexity, "perplexity_se": error and perplexity * error}  # delta method
    return metrics


def ratio(sums: Array, counts: Array) -> tuple[float | None, float | None]:
    """sums / counts over all prompts, and its standard error with the prompt as the sampling unit.

    Tokens of the same prompt are not independent, so a standard error over tokens would be too small. This is the ratio
    estimator (Cochran, Sampling Techniques, 1977, ch. 6). sums and counts: (prompts,).
    """
    if not counts.any():
        return None, None
    value = float(sums.sum() / counts.sum())
    num_prompts = int(np.count_nonzero(counts))
    if num_prompts < 2:
        return value, None
    residuals = sums - value * counts
    return value, float(math.sqrt((residuals**2).sum() * num_prompts / (num_prompts - 1)) / counts.sum())


def is_right(example_id: str, check: str, answer: str) -> bool:
    """Whether an answer passes the check of its row, which is JSON."""
    try:
        return passes(json.loads(check), answer)
    except CheckTimeoutError as error:
        print(f"{TEST}, example {example_id}: {error} for its answer, which is counted as failed")
        return False


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L: the F1 score of the longest common subsequence of words (Lin, 2004), for any language."""
    from torchmetrics.functional.text import rouge_score

    if answer == reference:  # also if there are no words
        return 1.0
    score = rouge_score(answer, reference, rouge_keys="rougeL", normalizer=str, tokenizer=words)
    return float(score["rougeL_fmeasure"])


def repetition(answer: str) -> float:
    """The share of 4-grams of words that repeat an earlier one (seq-rep-4, Welleck et al. 2019); 0 for a short answer.

    It measures loops within an answer. The shares of distinct words of all answers would rise if answers got shorter.
    """
    found = words(answer)
    grams = [tuple(found[start : start + NGRAM]) for start in range(len(found) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


if __name__ == "__main__":
    run(main)
