"""Render the template, tokenize and mask: `data/raw.parquet` → `data/formatted.parquet`.

Every row that can't be trained on goes to `data/rejected.parquet` with its reason. Rows are streamed in batches; one
process per CPU core formats the shards of a large table.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.checks import CheckTimeoutError, passes
from stages.data.conversations import Conversation, Formatted, content_ids, parse_conversation
from stages.data.examples import FORMATTED_SCHEMA, IGNORE_INDEX, REJECTED_SCHEMA, BadRowError
from stages.data.masking import load_tokenizer
from stages.data.show import describe, show_columns, show_formatted, show_rejected
from stages.data.tables import parquet_writer, read_batches, shard_writer, sharded, shards
from stages.data.templates import SELECTED_TEMPLATE, Template, load_template, select_template
from stages.runtime.errors import UserError, user_errors
from stages.runtime.files import write_csv, write_json
from stages.runtime.parallel import map_processes, prefetch_map
from stages.runtime.params import FormatParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary

RAW, UNREADABLE = Path("data/raw.parquet"), Path("data/unreadable.parquet")
FORMATTED, REJECTED = Path("data/formatted.parquet"), Path("data/rejected.parquet")
METRICS, LENGTHS = Path("metrics/format.json"), Path("metrics/lengths.csv")
COUNT_NAMES = ["rows_in", "kept", "left_out", "examples", "truncated", "tokens", "supervised_tokens"]
COUNT_NAMES += ["checks_failing_own_answer"]
MAX_LISTED = 5  # rows whose own answer fails their check
LENGTH_BIN = 16  # tokens per bar in the plot of lengths


@dataclass
class Counts:
    """Statistics of formatted and rejected rows.

    sources: for each source, counts by the names in `COUNT_NAMES`.
    reasons: for each source, rejected rows by reason.
    lengths: examples by tokens ÷ `LENGTH_BIN`.
    first_rejected: for each source, a description of the first rejected row.
    first_failing: descriptions of the first rows whose own answer fails their check.
    """

    sources: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reasons: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lengths: Counter[int] = field(default_factory=Counter)
    first_rejected: dict[str, str] = field(default_factory=dict)
    first_failing: list[str] = field(default_factory=list)

    def count(
        self, examples: pa.Table, rejected: list[dict[str, Any]], failing: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Count rows of `FORMATTED_SCHEMA` and of `REJECTED_SCHEMA`, and those that `failing_checks` returns."""
        for source, description in failing:
            self.sources[source]["checks_failing_own_answer"] += 1
            self.first_failing = [*self.first_failing, description][:MAX_LISTED]
        for row in rejected:
            self.first_rejected.setdefault(row["source"], describe(row))
            self.sources[row["source"]].update(rows_in=1, left_out=1)
            self.reasons[row["source"]][row["reason"]] += 1
        # Without the texts, which `filter` would copy.
        counted = examples.select(["source", "source_row", "labels", "truncated"])
        for name in pc.unique(counted["source"]).to_pylist():
            own = counted.filter(pc.equal(counted["source"], name))
            labels = own["labels"].combine_chunks()
            tokens = labels.flatten().to_numpy()
            num_rows = pc.count_distinct(own["source_row"]).as_py()  # a row can have several examples
            self.sources[name].update(
                rows_in=num_rows,
                kept=num_rows,
                examples=len(own),
                truncated=int(own["truncated"].to_numpy().sum()),
                tokens=len(tokens),
                supervised_tokens=int(np.count_nonzero(tokens != IGNORE_INDEX)),
            )
            self.lengths.update((labels.value_lengths().to_numpy() // LENGTH_BIN).tolist())

    def add(self, later: "Counts") -> None:
        """Add the counts of the rows after these."""
        for name, counts in later.sources.items():
            self.sources[name].update(counts)
        for name, counts in later.reasons.items():
            self.reasons[name].update(counts)
        self.lengths.update(later.lengths)
        self.first_rejected = later.first_rejected | self.first_rejected
        self.first_failing = [*self.first_failing, *later.first_failing][:MAX_LISTED]

    @property
    def total(self) -> Counter[str]:
        return sum(self.sources.values(), Counter())

    @property
    def all_reasons(self) -> Counter[str]:
        return sum(self.reasons.values(), Counter())

    def check(self) -> None:
        """Check that most rows of each source can be trained on.

        Raises:
            UserError: more than half of the rows of a source were rejected, or all.
        """
        for name, counts in self.sources.items():
            # A row that the template can't express is not a mistake in the source, but nothing is left of it either.
            mistakes = counts["left_out"] - self.reasons[name]["not_rendered"]
            if mistakes > counts["rows_in"] / 2 or not counts["kept"]:
                raise UserError(
                    f"{name}: {counts['left_out']:,} of {counts['rows_in']:,} rows can't be trained on "
                    f"({listed(self.reasons[name])}); more than half were rejected; fix the source. First: "
                    f"{self.first_rejected[name]}"
                )

    def metrics(self) -> dict[str, Any]:
        """The content of `metrics/format.json`, by source if there are several."""
        metrics: dict[str, Any] = {name: self.total[name] for name in COUNT_NAMES}
        metrics["left_out_by_reason"] = dict(sorted(self.all_reasons.items()))
        if len(self.sources) > 1:
            metrics["sources"] = {
                name: {key: counts[key] for key in COUNT_NAMES} for name, counts in sorted(self.sources.items())
            }
        return metrics


def listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())


def main() -> None:
    params = load_params(FormatParams)
    select_template(params.template)
    raw, counts = shards(RAW), Counts()
    with sharded(FORMATTED) as formatted, parquet_writer(REJECTED, REJECTED_SCHEMA) as rejected:
        for batch in read_batches(UNREADABLE):
            rejected.write(batch)
            counts.count(FORMATTED_SCHEMA.empty_table(), batch.to_pylist())
        format_one = partial(format_shard, params, formatted)
        for shard_counts, shard_rejected in map_processes(format_one, range(len(raw)), raw, desc="format"):
            rejected.write(shard_rejected)
            counts.add(shard_counts)
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
            "truncated": f"{total['truncated']:,} responses, at max_length = {params.max_length:,}",
        }
        | ({"checks": "\n".join([checks, *counts.first_failing])} if counts.first_failing else {}),
        wrote=[FORMATTED, REJECTED, SELECTED_TEMPLATE, METRICS, LENGTHS],
        then="python -m stages.format --show 3" + (" --rejected" if total["left_out"] else ""),
    )


def format_shard(params: FormatParams, formatted: Path, number: int, raw: Path) -> tuple[Counts, list[dict[str, Any]]]:
    """Format one shard of the raw table into the folder `formatted`; returns its counts and its rejected rows."""
    template = load_template(params.template, load_tokenizer(), params.template_options, params.reasoning_end)
    counts, all_rejected = Counts(), []
    with shard_writer(formatted, FORMATTED_SCHEMA, number) as writer:
        format_one = partial(format_batch, template=template, params=params)
        # Two threads: tokenizing releases the GIL, so that the other one can run.
        for examples, rejected, failing in prefetch_map(format_one, read_batches(raw), num_ahead=2):
            writer.write(examples)
            counts.count(examples, rejected, failing)
            all_rejected += rejected
    return counts, all_rejected


def format_batch(
    batch: pa.Table, template: Template, params: FormatParams
) -> tuple[pa.Table, list[dict[str, Any]], list[tuple[str, str]]]:
    """The rows of `FORMATTED_SCHEMA` and of `REJECTED_SCHEMA` for a batch of raw rows, in order, and failing checks."""
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
    encoded = formatted.encoded
    rows = np.array([indices[example.row] for example in formatted.examples], np.int64)
    fits = encoded.lengths > 0
    for index in set(rows.tolist()) - set(rows[fits].tolist()):
        detail = f"the prompt leaves no room for a response in max_length = {params.max_length}"
        errors[index] = BadRowError("prompt_too_long", detail)
    # A row of several examples is truncated if one of them does not fit.
    truncated = encoded.truncated | np.isin(rows, rows[~fits])

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
        "prompt_tokens": [sum(map(len, example.spans[::2])) for example in formatted.examples],
        "answer_tokens": [sum(map(len, example.spans[1::2])) for example in formatted.examples],
    }
    rejected = [
        {**location, "reason": errors[index].reason, "detail": str(errors[index])}
        for index, location in enumerate(batch.select(["source", "source_row"]).to_pylist())
        if index in errors
    ]
    assert len({*rows[fits].tolist()}) + len(rejected) == len(batch), "a row vanished"  # noqa: S101
    return (
        pa.table(columns, FORMATTED_SCHEMA).filter(pa.array(fits)),
        rejected,
        failing_checks(formatted, checks, origins),
    )


def failing_checks(formatted: Formatted, checks: pa.Array, origins: pa.Table) -> list[tuple[str, str]]:
    """The source and a description of each row whose own answer fails its check."""
    failing = []
    origin = (origins[name].to_pylist() for name in ("source", "source_row"))
    for answer, check, source, source_row in zip(formatted.responses, checks.to_pylist(), *origin, strict=True):
        try:
            is_right = check is None or passes(json.loads(check), answer)
        except CheckTimeoutError:
            is_right = False
        if not is_right:
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
        sys.exit()
    if options.show is None and not options.rejected:
        run(main)
    if options.show is None or options.show < 1:
        parser.error("--show: must be 1 or more rows, as in --show 3 --rejected")
    if options.rejected:
        run(lambda: show_rejected(REJECTED, options.show), exclusive=False)
    run(lambda: show_formatted(FORMATTED, options.show), exclusive=False)
