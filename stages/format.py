"""Render the template, tokenize and mask: `data/raw.parquet` → `data/formatted.parquet`.

Every row that can't be trained on goes to `data/rejected.parquet` with its reason. Rows are streamed in batches; one
process per CPU core formats the shards of a large table.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.checks.kinds import is_right
from stages.data.examples import FORMATTED_SCHEMA, REJECTED_SCHEMA, BadRowError
from stages.data.files import write_csv, write_json
from stages.data.tables import parquet_writer, read_batches, shard_writer, sharded, shards
from stages.data.tokenizer import PROMPT_FORMAT, load_tokenizer
from stages.rows.format_counts import LENGTH_BIN, Counts, FormattedBatch, describe_lengths, listed
from stages.rows.show import show_columns, show_formatted, show_rejected
from stages.runtime.errors import user_errors
from stages.runtime.parallel import map_processes, prefetch_map
from stages.runtime.params import FormatParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary
from stages.templates.conversations import Conversation, Formatted, content_ids, parse_conversation
from stages.templates.selection import SELECTED_TEMPLATE, Template, load_template, select_template

RAW, UNREADABLE = Path("data/raw.parquet"), Path("data/unreadable.parquet")
FORMATTED, REJECTED = Path("data/formatted.parquet"), Path("data/rejected.parquet")
METRICS, LENGTHS = Path("metrics/format.json"), Path("metrics/lengths.csv")


def main() -> None:
    params = load_params(FormatParams)
    select_template(params.template)
    raw, counts = shards(RAW), Counts()
    with sharded(FORMATTED) as formatted, parquet_writer(REJECTED, REJECTED_SCHEMA) as rejected:
        for batch in read_batches(UNREADABLE):
            rejected.write(batch)
            counts.count(FormattedBatch(FORMATTED_SCHEMA.empty_table(), batch.to_pylist()))
        format_one = partial(format_shard, params, formatted)
        for shard_counts, shard_rejected in map_processes(format_one, range(len(raw)), raw, desc="format"):
            rejected.write(shard_rejected)
            counts.add(shard_counts)
        counts.check_lengths(params)
        counts.check()
    write_json(METRICS, counts.metrics())
    total = counts.total
    bins = ((index * LENGTH_BIN, counts.lengths[index]) for index in range(max(counts.lengths) + 2))
    write_csv(LENGTHS, "tokens,examples", bins)
    checks = f"{total['checks_failing_own_answer']:,} fail for the row's own answer; the first:"
    summary(
        {
            "rows": f"{total['rows_in']:,} → {total['kept']:,} kept, {total['left_out']:,} rejected "
            f"({listed(counts.all_reasons) or 'none'}); {total['examples']:,} examples",
            "tokens": f"{total['tokens']:,}, of which {total['supervised_tokens']:,} supervised",
            "truncated": describe_lengths(counts, params),
        }
        | ({"checks": "\n".join([checks, *counts.first_failing])} if counts.first_failing else {}),
        wrote=[FORMATTED, REJECTED, SELECTED_TEMPLATE, PROMPT_FORMAT, METRICS, LENGTHS],
        then="python -m stages.format --show 3" + (" --rejected" if total["left_out"] else ""),
    )


def format_shard(params: FormatParams, formatted: Path, number: int, raw: Path) -> tuple[Counts, list[dict[str, Any]]]:
    """Format one shard of the raw table into the folder `formatted`; returns its counts and its rejected rows."""
    template = load_template(params.template, load_tokenizer(), params.template_options, params.reasoning_end)
    if number == 0:
        write_json(PROMPT_FORMAT, {"chat_template": template.chat_template, "eos_token_ids": template.eos_token_ids})
    counts, all_rejected = Counts(), []
    with shard_writer(formatted, FORMATTED_SCHEMA, number) as writer:
        format_one = partial(format_batch, template=template, params=params)
        # Two threads: tokenizing releases the GIL, so that the other one can run.
        for batch in prefetch_map(format_one, read_batches(raw), num_ahead=2):
            writer.write(batch.examples)
            counts.count(batch)
            all_rejected += batch.rejected
    return counts, all_rejected


def render_batch(
    batch: pa.Table, template: Template, params: FormatParams
) -> tuple[Formatted, npt.NDArray[np.int64], dict[int, BadRowError]]:
    """Parse, render, tokenize and mask a batch of raw rows.

    Returns:
        The examples; the row of each, int64 (examples,); and the errors of the other rows, by their index.
    """
    conversations: dict[int, Conversation] = {}
    errors: dict[int, BadRowError] = {}
    for index, row in enumerate(batch.to_pylist()):
        try:
            conversations[index] = parse_conversation(row, params.train_on)
        except BadRowError as error:
            errors[index] = error
    indices = list(conversations)
    with user_errors("models/tokenizer", "its tokenizer can't encode this text: use another model"):
        formatted = template.format(list(conversations.values()), params.max_length)
    errors |= {indices[row]: error for row, error in formatted.errors.items()}
    return formatted, np.array([indices[example.row] for example in formatted.examples], np.int64), errors


def format_batch(batch: pa.Table, template: Template, params: FormatParams) -> FormattedBatch:
    """The examples of a batch of raw rows, and the rows that are rejected."""
    formatted, rows, errors = render_batch(batch, template, params)
    encoded = formatted.encoded
    fits = encoded.lengths > 0
    for index in set(rows.tolist()) - set(rows[fits].tolist()):
        detail = f"the prompt leaves no room for a response in max_length = {params.max_length}"
        errors[index] = BadRowError("prompt_too_long", detail)
    # A row of several examples is truncated if one of them does not fit.
    truncated = encoded.truncated | np.isin(rows, rows[~fits])
    if params.long_rows != "truncate":
        fits &= ~np.isin(rows, rows[truncated])
        detail = f"longer than max_length = {params.max_length}; long_rows is {params.long_rows}"
        errors |= {index: BadRowError("too_long", detail) for index in set(rows[truncated].tolist()) - errors.keys()}

    prompt_tokens, answer_tokens = (
        np.array([sum(map(len, example.spans[first::2])) for example in formatted.examples], np.int32)
        for first in (0, 1)
    )
    ids = [content_ids(example.conversation) for example in formatted.examples]
    offsets = pa.array(np.concatenate([[0], encoded.lengths.cumsum()]), pa.int32())
    origins = batch.select(["source", "source_row", "slice", "use"]).take(pa.array(rows))
    # A check is about the last answer of a row, which the last of its examples has if it is complete.
    is_last = np.append(rows[1:] != rows[:-1], True)[: len(rows)]
    checks = batch["check"].take(pa.array(rows, mask=~is_last | encoded.truncated | ~fits))
    columns = {
        "example_id": [example_id for _, example_id in ids],
        "prompt_id": [prompt_id for prompt_id, _ in ids],
        **dict(zip(origins.column_names, origins.columns, strict=True)),
        "prompt": formatted.prompts,
        "response": formatted.responses,
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(encoded.input_ids)),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(encoded.labels)),
        "truncated": truncated,
        "check": checks,
        "other_columns": batch["other_columns"].take(pa.array(rows)),
        "questions": [example.conversation.questions for example in formatted.examples],
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
    }
    rejected = [
        {**location, "reason": errors[index].reason, "detail": str(errors[index])}
        for index, location in enumerate(batch.select(["source", "source_row"]).to_pylist())
        if index in errors
    ]
    assert len({*rows[fits].tolist()}) + len(rejected) == len(batch), "a row vanished"  # noqa: S101
    return FormattedBatch(
        pa.table(columns, FORMATTED_SCHEMA).filter(pa.array(fits)),
        rejected,
        failing_checks(formatted, checks, origins),
        (prompt_tokens + answer_tokens).tolist(),
    )


def failing_checks(formatted: Formatted, checks: pa.Array, origins: pa.Table) -> list[tuple[str, str]]:
    """The source and a description of each row whose own answer fails its check."""
    failing = []
    origin = (origins[name].to_pylist() for name in ("source", "source_row"))
    for answer, check, source, source_row in zip(formatted.responses, checks.to_pylist(), *origin, strict=True):
        if not is_right(check, answer):
            failing.append((source, f"{source}, row {source_row:,}: {check:.120} fails for {answer!r:.120}"))
    return failing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render the template, tokenize and mask, or print rows.")
    parser.add_argument("--show", type=int, metavar="N", help="print the first N formatted examples instead of running")
    parser.add_argument("--rejected", action="store_true", help="with --show: print rejected rows and their reasons")
    parser.add_argument("--columns", action="store_true", help="print what each column of the dataset becomes instead")
    options = parser.parse_args()
    if options.columns:
        run(show_columns, exclusive=False)
    if options.show is None and not options.rejected:
        run(main)
    if options.show is None or options.show < 1:
        parser.error("--show: must be 1 or more rows, as in --show 3 --rejected")
    if options.rejected:
        run(lambda: show_rejected(REJECTED, options.show), exclusive=False)
    run(lambda: show_formatted(FORMATTED, options.show), exclusive=False)
