"""Score the training rows under the base model, to find bad ones: → `data/train_scores.parquet`.

The table has the loss of each row's answers after their prompts and without them. The difference, the pointwise mutual
information of prompt and answer (PMI), is low if an answer does not depend on its question. The loss of the EOS token
is high if an answer stops too early. This takes two forward passes per row, so it is off by default, and then the table
is empty. docs/row-scores.md has measurements of how well the scores find bad rows.
"""

import os
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.examples import IGNORE_INDEX, Example, Split
from stages.data.splits import choose_splits
from stages.data.tables import parquet_writer, read_batches
from stages.data.tokenizer import load_tokenizer
from stages.runtime.errors import UserError
from stages.runtime.params import ScoreRowsParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary
from stages.templates.selection import Template, load_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.engine.distributed import DistributedContext

FORMATTED, SCORES, BASE = Path("data/formatted.parquet"), Path("data/train_scores.parquet"), Path("models/base")
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
    rows = []
    if params.score_rows:
        from stages.engine.distributed import run_inference

        rows = run_inference(params.launcher, partial(score_training_rows, params)) or []
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
    with_prompt = [example for example, row in zip(examples, rows, strict=True) if row["has_prompt"]]
    template = load_template(params.template, load_tokenizer(), params.template_options)
    model = load_for_inference(BASE, params.precision, context)
    losses, without_prompt = score_examples(model, template, examples, with_prompt, params, context)
    return [row | summarize(row, losses[row["example_id"]], without_prompt.get(row["example_id"])) for row in rows]


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
    template: Template,
    examples: Sequence[Example],
    with_prompt: Sequence[Example],
    params: ScoreRowsParams,
    context: "DistributedContext",
) -> tuple[dict[str, Losses], dict[str, Losses]]:
    """The losses of the examples by their ids, and the losses of those that have a prompt, without it."""
    from stages.engine.loss import score
    from stages.engine.models import autocast
    from stages.engine.probe import choose_scoring_batches

    empty_prompt = template.encode_prompts([""])[0] if with_prompt else []
    others = [without_prompts(example, empty_prompt) for example in with_prompt]
    batches = choose_scoring_batches(model, chain(examples, others), params)
    with autocast(params.precision, model.device, cache_enabled=not context.sharded):
        results = score(model, batches, examples), score(model, batches, others)
    losses, without_prompt = ({name: at_tokens.losses.numpy() for name, at_tokens in one.items()} for one in results)
    return losses, without_prompt


def without_prompts(example: Example, empty_prompt: list[int]) -> Example:
    """The supervised tokens of an example after the prompt of an empty question, not longer than the example."""
    answers = example.labels[example.labels != IGNORE_INDEX]
    prompt = np.array(empty_prompt[-(len(example.labels) - len(answers)) :], np.int32)
    labels = np.concatenate([np.full_like(prompt, IGNORE_INDEX), answers])
    return Example(example.example_id, np.concatenate([prompt, answers]), labels)


def summarize(row: dict[str, Any], losses: Losses, without_prompt: Losses | None) -> dict[str, Any]:
    """The columns of `SCORES_SCHEMA` that are computed from losses.

    Args:
        row: says whether it is `truncated`, and so has no EOS token.
        without_prompt: None if the row has no prompt.
    """
    num_tokens = len(losses) if row["truncated"] else len(losses) - 1  # without the EOS token
    per_token = max(num_tokens, 1)  # a tokenizer may drop all characters of an answer
    loss_sum = float(losses[:num_tokens].sum())
    eos_loss = None if row["truncated"] else float(losses[-1])
    columns = {"tokens": num_tokens, "loss": loss_sum / per_token, "eos_loss": eos_loss}
    if without_prompt is not None:
        sum_without_prompt = float(without_prompt[:num_tokens].sum())
        pmi = sum_without_prompt - loss_sum
        columns |= {
            "pmi": pmi,
            "pmi_per_token": pmi / per_token,
            "loss_without_prompt": sum_without_prompt / per_token,
        }
    return columns


if __name__ == "__main__":
    run(main)
