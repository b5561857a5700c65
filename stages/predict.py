"""Compute the loss of one model on the test split and the retention set, and its answers.

`data/answers/<model>.parquet` is an output of its own, so that a changed check or scorer needs no model: `evaluate`
scores the same answers again.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stages.data.examples import Example, Split, read_split
from stages.data.tables import write_parquet
from stages.data.tokenizer import load_tokenizer
from stages.runtime.errors import UserError
from stages.runtime.params import PredictParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary
from stages.templates.selection import load_template

if TYPE_CHECKING:
    from stages.engine.decoding import Answer
    from stages.engine.distributed import DistributedContext
    from stages.engine.loss import TokenLosses

TEST, RETENTION = Path("data/test.parquet"), Path("data/retention.parquet")
MAX_LOSS = 100  # nats/token; a uniform guess over the vocabulary has about 10
SEED = 0  # of sampled answers; not that of training, which must not change the answers of the base model
ANSWERS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("example_id", pa.string()),
        ("loss", pa.float64()),  # mean over the example's supervised tokens, in nats
        ("tokens", pa.int64()),  # supervised tokens
        ("correct_tokens", pa.int64()),
        ("reference_fits", pa.bool_()),  # whether the reference with its EOS token fits into max_new_tokens
        ("answers", pa.list_(pa.string())),  # the final text of each answer
        ("reasoning", pa.list_(pa.string())),  # of each answer; null if it has none
        ("calls", pa.list_(pa.string())),  # the tool calls of each answer; null if it has none
        ("open_reasoning", pa.list_(pa.bool_())),  # whether the reasoning of each answer never closes
        ("answer_tokens", pa.list_(pa.int64())),  # of each answer, without the EOS token
        ("stopped", pa.list_(pa.bool_())),  # whether each answer ends with EOS
    ]
)


def main() -> None:
    params = load_params(PredictParams)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["base", "tuned"])
    name = parser.parse_args().model
    path = Path(f"data/answers/{name}.parquet")

    from stages.engine.distributed import run_inference

    rows = run_inference(params.launcher, partial(predict, Path("models") / name, params))
    if rows is None:
        return
    write_parquet(path, rows, ANSWERS_SCHEMA)
    kind = "greedy" if params.answers_per_prompt == 1 else "sampled at temperature 1"
    test = [row for row in rows if row["split"] == "test"]
    summary(
        {
            "model": f"{name}, {len(test):,} test examples, {len(rows) - len(test):,} of the retention set",
            "loss": f"{mean_loss(test):.3f} nats/token on the test split",
            "answers": f"{params.answers_per_prompt:,} per prompt, {kind}, at most {params.max_new_tokens:,} tokens",
        },
        wrote=[path],
        then=f"dvc repro evaluate@{name}",
    )


def predict(folder: Path, params: PredictParams, context: "DistributedContext") -> list[dict[str, Any]]:
    """The rows of `ANSWERS_SCHEMA`, in the order of the splits. If weights are sharded, all ranks compute the same.

    Raises:
        UserError: the loss is far above that of a random guess, or not a number.
    """
    from transformers import set_seed

    from stages.engine.decoding import choose_method, generate_answers, generation_settings
    from stages.engine.loading import load_for_inference
    from stages.engine.loss import score
    from stages.engine.models import autocast
    from stages.engine.probe import choose_scoring_batches

    splits = {"test": read_split(TEST)}
    if len(retention := Split(RETENTION)):
        splits["retention"] = retention
    model, tokenizer = load_for_inference(folder, params.precision, context), load_tokenizer()
    batches = choose_scoring_batches(model, chain.from_iterable(splits.values()), params)
    prompts = [prompt_ids(example) for examples in splits.values() for example in examples]
    method = choose_method(model, prompts, params.max_new_tokens)
    num_answers, max_tokens = params.answers_per_prompt, params.batch_size * params.max_length
    rows = []
    # One split after the other, so that rows of the retention set have no effect on the rounding of the test losses.
    for name, examples in splits.items():
        template = load_template(params.template, tokenizer, params.template_options, params.reasoning_end)
        temperature = 0.0 if num_answers == 1 else 1.0
        settings = generation_settings(template.eos_token_ids, params.max_new_tokens, temperature)
        prompts = [prompt_ids(example) for example in examples for _ in range(num_answers)]
        set_seed(SEED)
        with autocast(params.precision, model.device, cache_enabled=not context.sharded):
            results = score(model, batches, examples)
            answers = iter(generate_answers(model, template.answer_parser, prompts, settings, max_tokens, method))
        for example in examples:
            row = answers_row(example, results[example.example_id], list(islice(answers, num_answers)))
            fits = len(example.input_ids) - example.last_response <= params.max_new_tokens
            rows.append(row | {"split": name, "reference_fits": fits})
    loss = mean_loss(rows)
    if not loss < MAX_LOSS:
        raise UserError(
            f"the loss is {loss:g} nats/token: training diverged, or the model is broken; lower learning_rate"
        )
    return rows


def answers_row(example: Example, result: "TokenLosses", answers: Sequence["Answer"]) -> dict[str, Any]:
    """The columns of `ANSWERS_SCHEMA` that losses and answers determine."""
    num_tokens = len(result.losses)
    return {
        "example_id": example.example_id,
        "loss": result.losses.sum().item() / num_tokens,
        "tokens": num_tokens,
        "correct_tokens": int(result.correct.sum()),
        "answers": [answer.parts.text for answer in answers],
        "reasoning": [answer.parts.reasoning for answer in answers],
        "calls": [answer.parts.calls for answer in answers],
        "open_reasoning": [answer.parts.is_open for answer in answers],
        "answer_tokens": [answer.num_tokens for answer in answers],
        "stopped": [answer.stopped for answer in answers],
    }


def prompt_ids(example: Example) -> list[int]:
    """The tokens before the last response."""
    ids: list[int] = example.input_ids[: example.last_response].tolist()
    return ids


def mean_loss(rows: Sequence[dict[str, Any]]) -> float:
    """In nats/token, over the supervised tokens of all rows."""
    return float(sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows))


if __name__ == "__main__":
    run(main)
