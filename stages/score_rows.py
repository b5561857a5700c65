"""Score the training rows under the base model, to find bad ones: → `data/train_scores.parquet`.

For each row, the loss of its answers after their prompts and without them. The difference, the pointwise mutual
information of prompt and answer (PMI), is low if an answer does not depend on its question. The loss of the EOS token
is high if an answer stops too early. This takes two forward passes per row, so it is off by default, and then the table
is empty. docs/row-scores.md has measurements of how well the scores find bad rows.
"""

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.examples import IGNORE_INDEX, Example, Split
from stages.data.masking import load_tokenizer
from stages.data.splits import choose_splits
from stages.data.tables import parquet_writer, read_batches
from stages.data.templates import load_template
from stages.runtime.errors import UserError
from stages.runtime.params import ScoreRowsParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import progress, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.engine.distributed import DistributedContext

FORMATTED, SCORES, BASE = Path("data/formatted.parquet"), Path("data/train_scores.parquet"), Path("models/base")
SCORED_TOKENS = 2  # per token of a micro-batch in training; no activations are kept for a backward pass
Losses = npt.NDArray[np.float64]  # (supervised tokens,), in nats
SCORES_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("tokens", pa.int64()),  # of the answers, without the EOS token at the end
        ("loss", pa.float64()),  # mean over these tokens after their prompts, in nats/token
        # Null for plain text, which has no prompt.
        ("loss_without_prompt", pa.float64()),  # after the prompt of an empty question
        ("pmi", pa.float64()),  # (loss_without_prompt - loss) * tokens, in nats
        ("pmi_per_token", pa.float64()),  # in nats/token
        ("eos_loss", pa.float64()),  # of the EOS token at the end, in nats; null if the row is truncated
    ]
)


def main() -> None:
    params = load_params(ScoreRowsParams)
    rows: list[dict[str, Any]] = []
    if params.score_rows:
        from stages.engine.distributed import init_distributed

        context = init_distributed()
        if context.sharded:
            print(f"Launcher: {params.launcher}: {context}")
        if context.is_needed_for_inference:
            rows = score_training_rows(params, context)
        context.shutdown()
    if os.environ.get("RANK", "0") != "0":  # another rank of the launcher
        return
    with parquet_writer(SCORES, SCORES_SCHEMA) as writer:
        writer.write(rows)
    scored = f"{len(rows):,} training rows, by the base model" if params.score_rows else "none (score_rows: false)"
    summary({"scored": scored}, wrote=[SCORES], then="make data" if params.score_rows else "dvc repro")


def score_training_rows(params: ScoreRowsParams, context: "DistributedContext") -> list[dict[str, Any]]:
    """The rows of `SCORES_SCHEMA`. If weights are sharded, all ranks compute the same."""
    from stages.engine.loading import load_for_inference

    rows, formatted = read_training_rows(params), Split(FORMATTED)
    examples = [formatted[row["number"]] for row in rows]
    template = load_template(params.template, load_tokenizer(), params.template_options)
    model = load_for_inference(BASE, params.precision, context)
    scores = score_examples(model, examples, template.encode_prompts([""])[0], params, context)
    return [row | summarize(row, *losses) for row, losses in zip(rows, scores, strict=True)]


def read_training_rows(params: ScoreRowsParams) -> list[dict[str, Any]]:
    """The distinct training rows, with their number in the table and whether they have a prompt.

    Raises:
        UserError: there is none.
    """
    tables, first = [], 0
    for batch in read_batches(
        FORMATTED, ["example_id", "source", "source_row", "truncated", "prompt_id", "use", "prompt", "response"]
    ):
        is_train = pa.array([split == "train" for split in choose_splits(batch, params)], pa.bool_())
        numbers = pa.array(range(first, first + len(batch)), pa.int64())
        first += len(batch)
        rows = batch.select(["example_id", "source", "source_row", "truncated"]).append_column("number", numbers)
        # Plain text is its own prompt and response.
        rows = rows.append_column("has_prompt", pc.not_equal(batch["prompt"], batch["response"]))
        tables.append(rows.filter(is_train))
    distinct = pa.concat_tables(tables).to_pandas().drop_duplicates("example_id")
    if distinct.empty:
        raise UserError("score_rows: the training split has no rows; lower validation_fraction or test_fraction")
    records: list[dict[str, Any]] = distinct.to_dict("records")
    return records


def score_examples(
    model: "PreTrainedModel",
    examples: Sequence[Example],
    empty_prompt: list[int],
    params: ScoreRowsParams,
    context: "DistributedContext",
) -> list[tuple[Losses, Losses]]:
    """The loss at each supervised token of each example, after its prompts and without them.

    Args:
        empty_prompt: the ids of the prompt of an empty question, which takes the place of the prompts.
    """
    import torch

    from stages.engine.loss import losses_by_example
    from stages.engine.models import autocast
    from stages.engine.probe import choose_batches

    both = [examples, [without_prompts(example, empty_prompt) for example in examples]]
    max_tokens = SCORED_TOKENS * params.tokens_per_batch
    batches, messages, _ = choose_batches(model, chain.from_iterable(both), max_tokens, params.precision)
    print(*messages, sep="\n", flush=True)
    losses: list[dict[str, Losses]] = []
    with torch.inference_mode(), autocast(params.precision, model.device, cache_enabled=not context.sharded):
        for side in both:
            micro_batches = progress(batches.micro_batches(side), "score", "micro-batch")
            results = losses_by_example(model, micro_batches)
            losses.append({example.example_id: result.losses.cpu().double().numpy() for example, result in results})
    return [(losses[0][example.example_id], losses[1][example.example_id]) for example in examples]


def without_prompts(example: Example, empty_prompt: list[int]) -> Example:
    """The supervised tokens of an example after the prompt of an empty question."""
    answers, prompt = example.labels[example.labels != IGNORE_INDEX], np.array(empty_prompt, np.int32)
    labels = np.concatenate([np.full_like(prompt, IGNORE_INDEX), answers])
    return Example(example.example_id, np.concatenate([prompt, answers]), labels)


def summarize(row: dict[str, Any], losses: Losses, losses_without_prompt: Losses) -> dict[str, Any]:
    """The columns of `SCORES_SCHEMA` that are computed from losses.

    Args:
        row: from `read_training_rows`.
    """
    num_tokens = len(losses) if row["truncated"] else len(losses) - 1  # without the EOS token
    loss_sum, sum_without_prompt = (float(each[:num_tokens].sum()) for each in (losses, losses_without_prompt))
    per_token = max(num_tokens, 1)  # a tokenizer may drop all characters of an answer
    eos_loss = None if row["truncated"] else float(losses[-1])
    columns = {"tokens": num_tokens, "loss": loss_sum / per_token, "eos_loss": eos_loss}
    if row["has_prompt"]:
        pmi = sum_without_prompt - loss_sum
        columns |= {
            "pmi": pmi,
            "pmi_per_token": pmi / num_tokens,
            "loss_without_prompt": sum_without_prompt / num_tokens,
        }
    return columns


if __name__ == "__main__":
    run(main)
