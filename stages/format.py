"""Render by the template, tokenise, mask: `data/raw.parquet` → `data/formatted.parquet`.

Every row that can't be trained on goes to the ledger `data/left_out.parquet` with the reason. Rows stream in batches;
the shards of a large table are formatted by a process for each core.
"""

import argparse
import hashlib
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from stages.shared.errors import UserError, reading
from stages.shared.examples import FORMATTED, LEFT_OUT, NOT_SUPERVISED, BadRowError
from stages.shared.files import (
    parquet_writer,
    read_batches,
    read_json,
    shard_writer,
    sharded,
    shards,
    write_csv,
    write_json,
)
from stages.shared.masking import load_tokenizer
from stages.shared.params import FormatParams, load_params
from stages.shared.processes import map_processes
from stages.shared.run import run
from stages.shared.templates import Conversation, Template, load_template
from stages.shared.terminal import console, summary
from stages.shared.text import printable

FORMATTED_FILE, LEFT_OUT_FILE = Path("data/formatted.parquet"), Path("data/left_out.parquet")
LENGTHS = Path("metrics/lengths.csv")
COUNTED = ("rows_in", "kept", "left_out", "truncated", "tokens", "supervised_tokens")
LENGTH_BIN = 16  # tokens, the width of a bar in the plot of lengths
S = TypeVar("S")
T = TypeVar("T")


@dataclass
class Counts:
    """What came of some rows.

    sources: of each source, by the names of `COUNTED`.
    reasons: rows left out, by reason.
    lengths: examples, by tokens ÷ `LENGTH_BIN`.
    first_left_out: the first row left out, in words; empty where there is none.
    """

    sources: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reasons: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    first_left_out: str = ""

    def count(self, examples: pa.Table, left_out: list[dict[str, Any]]) -> None:
        """Add rows of `FORMATTED` and rows of `LEFT_OUT`."""
        if left_out:
            self.first_left_out = self.first_left_out or describe(left_out[0])
        for entry in left_out:
            self.sources[entry["source"]].update(rows_in=1, left_out=1)
            self.reasons[entry["reason"]] += 1
        counted = examples.select(["source", "labels", "truncated"])  # not the text, which `filter` would copy
        for name in pc.unique(counted["source"]).to_pylist():
            own = counted.filter(pc.equal(counted["source"], name))
            labels = own["labels"].combine_chunks()
            tokens = labels.flatten().to_numpy()
            self.sources[name].update(
                rows_in=len(own),
                kept=len(own),
                truncated=int(own["truncated"].to_numpy().sum()),
                tokens=len(tokens),
                supervised_tokens=int(np.count_nonzero(tokens != NOT_SUPERVISED)),
            )
            self.lengths.update((labels.value_lengths().to_numpy() // LENGTH_BIN).tolist())

    def add(self, later: "Counts") -> None:
        for name, counts in later.sources.items():
            self.sources[name].update(counts)
        self.reasons.update(later.reasons)
        self.lengths.update(later.lengths)
        self.first_left_out = self.first_left_out or later.first_left_out


def main() -> None:
    params = load_params(FormatParams)
    raw, all_counts = shards(Path("data/raw.parquet")), Counts()
    with sharded(FORMATTED_FILE) as formatted, parquet_writer(LEFT_OUT_FILE, LEFT_OUT) as ledger:
        for batch in read_batches(Path("data/unreadable.parquet")):
            ledger.write(batch)
            all_counts.count(FORMATTED.empty_table(), batch.to_pylist())
        format_one = partial(format_shard, params, formatted)
        for counts, left_out in map_processes(format_one, range(len(raw)), raw, doing="format"):
            ledger.write(left_out)
            all_counts.add(counts)

        source, total = read_json(Path("data/source.json")), sum(all_counts.sources.values(), Counter())
        if source["rows"] != total["rows_in"]:
            raise UserError(
                f"data/source.json: says {source['rows']:,} rows, raw.parquet and unreadable.parquet have "
                f"{total['rows_in']:,}; run `dvc repro`, which makes all of them"
            )
        if total["left_out"] > total["rows_in"] / 2:
            raise UserError(
                f"{source['source']}: {total['left_out']:,} of {total['rows_in']:,} rows can't be trained on "
                f"({_listed(all_counts.reasons)}); more than half is no accident: mend the source. First, "
                f"{all_counts.first_left_out}"
            )

    metrics: dict[str, Any] = {name: total[name] for name in COUNTED}
    metrics["left_out_by_reason"] = dict(sorted(all_counts.reasons.items()))
    if len(all_counts.sources) > 1:
        by_source = sorted(all_counts.sources.items())
        metrics["sources"] = {name: {key: counts[key] for key in COUNTED} for name, counts in by_source}
    write_json(Path("metrics/format.json"), metrics)
    lengths = all_counts.lengths
    write_csv(LENGTHS, "tokens,examples", ((index * LENGTH_BIN, lengths[index]) for index in range(max(lengths) + 2)))
    summary(
        {
            "rows": f"{total['rows_in']:,} → {total['kept']:,} kept, {total['left_out']:,} left out "
            f"({_listed(all_counts.reasons) or 'none'})",
            "tokens": f"{total['tokens']:,}, of which {total['supervised_tokens']:,} supervised",
            "truncated": f"{total['truncated']:,} responses, at max_length = {params.max_length:,}",
        },
        wrote=[FORMATTED_FILE, LEFT_OUT_FILE, "metrics/format.json", LENGTHS],
        then="python -m stages.format --show 3" + (" --left-out" if total["left_out"] else ""),
    )


def format_shard(params: FormatParams, formatted: Path, number: int, raw: Path) -> tuple[Counts, list[dict[str, Any]]]:
    """Write one shard of `formatted` from its rows in raw.parquet. Its counts, and its rows of `LEFT_OUT`."""
    template = load_template(params.template, load_tokenizer())
    counts, all_left_out = Counts(), []
    with shard_writer(formatted, FORMATTED, number) as writer:
        batches = read_batches(raw)
        for examples, left_out in map_ahead(lambda batch: format_batch(batch, template, params.max_length), batches):
            writer.write(examples)
            counts.count(examples, left_out)
            all_left_out += left_out
    return counts, all_left_out


def describe(entry: dict[str, Any]) -> str:
    """A row of the ledger in words."""
    return "{source}, row {source_row:,}: {reason}: {detail}".format(**entry)


def show(number: int, left_out: bool) -> None:
    """Print the first formatted examples with what is masked and what is supervised, or rows of the ledger."""
    out = console()
    batches = read_batches(LEFT_OUT_FILE if left_out else FORMATTED_FILE)
    rows = list(islice(chain.from_iterable(batch.to_pylist() for batch in batches), number))
    if left_out:
        if not rows:
            out.print(f"{LEFT_OUT_FILE}: no row was left out")
        for row in rows:
            out.print(Text(printable(describe(row))))
        return
    tokenizer = load_tokenizer()
    for row in rows:
        table = Table.grid(padding=(0, 2))
        cut = ", cut at max_length" if row["truncated"] else ""
        out.print(Text(f"{row['source']}, row {row['source_row']:,}: {len(row['input_ids']):,} tokens{cut}", "bold"))
        tokens = zip(row["input_ids"], row["labels"], strict=True)
        for masked, span in groupby(tokens, key=lambda token: token[1] == NOT_SUPERVISED):
            ids = [token_id for token_id, _ in span]
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            name, style = ("masked", "dim") if masked else ("supervised", "green")
            table.add_row(f"  {name}, {len(ids):,}", Text(printable(text), style))
        out.print(table)


def format_batch(batch: pa.Table, template: Template, max_length: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """A row of `FORMATTED` for each row that can be trained on, a row of `LEFT_OUT` for each other, in order."""
    conversations: dict[int, Conversation] = {}
    faults: dict[int, BadRowError] = {}
    for index, row in enumerate(batch.to_pylist()):
        try:
            conversations[index] = read_conversation(row)
        except BadRowError as error:
            faults[index] = error
    indices = list(conversations)
    with reading("models/tokenizer", "its tokenizer can't encode this text: use another model"):
        formatted = template.format(list(conversations.values()), max_length)
    encoded = formatted.encoded
    for at, index in enumerate(indices):
        if at in formatted.faults:
            faults[index] = formatted.faults[at]
        elif not encoded.lengths[at]:
            detail = f"the prompt leaves no room in max_length = {max_length}"
            faults[index] = BadRowError("prompt_too_long", detail)

    ids = [content_ids(conversation) for conversation in conversations.values()]
    offsets = pa.array(np.concatenate([[0], encoded.lengths.cumsum()]), pa.int32())
    places = batch.select(["source", "source_row"])
    columns = {
        "example_id": [example_id for _, example_id in ids],
        "prompt_id": [prompt_id for prompt_id, _ in ids],
        **dict(zip(places.column_names, places.take(pa.array(indices, pa.int64())).columns, strict=True)),
        "prompt": formatted.prompts,
        "response": formatted.responses,
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(encoded.input_ids)),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(encoded.labels)),
        "truncated": encoded.truncated,
    }
    kept = pa.array([at for at, index in enumerate(indices) if index not in faults], pa.int64())
    left_out = [
        {**place, "reason": faults[index].reason, "detail": str(faults[index])}
        for index, place in enumerate(places.to_pylist())
        if index in faults
    ]
    return pa.table(columns, FORMATTED).take(kept), left_out


def read_conversation(row: dict[str, Any]) -> Conversation:
    """The turns up to the last response, without white space around them.

    Raises:
        BadRowError: there is no response, or an empty turn.
    """
    messages = [{**message, "content": message["content"].strip()} for message in row["messages"]]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise BadRowError("no_exchange", "has no user's turn with an assistant's turn after it")
    for number, message in enumerate(messages, 1):
        if not message["content"]:
            reason = "empty_response" if message["role"] == "assistant" else "empty_instruction"
            raise BadRowError(reason, f"turn {number} ({message['role']}) is empty")
    return Conversation(messages, row["input"].strip(), f"{row['source']}, row {row['source_row']:,}")


def content_ids(conversation: Conversation) -> tuple[str, str]:
    """Of the prompt, by which a split is chosen, and of the example, by which duplicates are found.

    Conversations that begin with the same question have the same prompt: they never lie in two splits.
    """
    first = next(message for message in conversation.messages if message["role"] == "user")
    prompt_id = content_hash(normalise(first["content"]), normalise(conversation.input))
    rest = [message for message in conversation.messages if message is not first]
    if len(rest) == 1:
        return prompt_id, content_hash(prompt_id, rest[0]["content"])
    return prompt_id, content_hash(prompt_id, *(part for message in rest for part in message.values()))


def map_ahead(function: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """`map` in two threads that are at most two items ahead: one tokenises, which is not Python, while the other is."""
    with ThreadPoolExecutor(2) as pool:
        pending = deque(pool.submit(function, item) for item in islice(items, 2))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result


def normalise(text: str) -> str:
    """Text by which prompts count as equal: whatever their case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_hash(*parts: str) -> str:
    """32 hexadecimal digits, from the parts alone."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", type=int, metavar="N", help="run nothing; print the first N formatted examples")
    parser.add_argument("--left-out", action="store_true", help="with --show: rows that were left out, and why")
    options = parser.parse_args()
    if options.show is None and not options.left_out:
        run(main)
    if options.show is None or options.show < 1:
        parser.error("--show: must be 1 or more rows, as in --show 3 --left-out")
    run(lambda: show(options.show, options.left_out), alone=False)
