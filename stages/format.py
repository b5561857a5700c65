"""Template, tokenise, mask: `data/raw.parquet` → `data/formatted.parquet`.

Every row that can't be trained on goes to the ledger `data/left_out.parquet` with the reason. Rows stream in batches.
"""

import argparse
import hashlib
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from stages.shared.errors import UserError, reading
from stages.shared.examples import FORMATTED, LEFT_OUT, NOT_SUPERVISED
from stages.shared.files import parquet_writer, read_batches, read_json, write_csv, write_json
from stages.shared.masking import encode_examples
from stages.shared.params import FormatParams, load_params
from stages.shared.run import run
from stages.shared.templates import render_prompt
from stages.shared.terminal import console, summary
from stages.shared.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATTED_FILE, LEFT_OUT_FILE = Path("data/formatted.parquet"), Path("data/left_out.parquet")
LENGTHS = Path("metrics/lengths.csv")
LENGTH_BIN = 16  # tokens, the width of a bar in the plot of lengths
S = TypeVar("S")
T = TypeVar("T")


def main() -> None:
    params = load_params(FormatParams)
    tokenizer = load_tokenizer()
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    first_left_out = ""

    unreadable = read_batches(Path("data/unreadable.parquet"))
    parts: Iterator[tuple[pa.Table, list[dict[str, Any]]]] = chain(
        ((FORMATTED.empty_table(), batch.to_pylist()) for batch in unreadable),
        map_ahead(lambda batch: format_batch(batch, tokenizer, params), read_batches(Path("data/raw.parquet"))),
    )
    with (
        parquet_writer(FORMATTED_FILE, FORMATTED) as formatted,
        parquet_writer(LEFT_OUT_FILE, LEFT_OUT) as ledger,
    ):
        for examples, entries in parts:
            formatted.write(examples)
            ledger.write(entries)
            left_out.update(entry["reason"] for entry in entries)
            if entries and not first_left_out:
                first_left_out = "row {source_row}: {reason}: {detail}".format(**entries[0])
            num_tokens = examples["input_ids"].combine_chunks().value_lengths().to_numpy()
            lengths.update((num_tokens // LENGTH_BIN).tolist())
            counts["truncated"] += int(examples["truncated"].to_numpy().sum())
            counts["tokens"] += int(num_tokens.sum())
            labels = examples["labels"].combine_chunks().flatten().to_numpy()
            counts["supervised_tokens"] += int(np.count_nonzero(labels != NOT_SUPERVISED))

        source = read_json(Path("data/source.json"))
        kept, rows_in = formatted.num_rows, source["rows"]
        if rows_in != kept + left_out.total():
            raise UserError(
                f"data/source.json: says {rows_in:,} rows, raw.parquet and unreadable.parquet have "
                f"{kept + left_out.total():,}; run `dvc repro`, which makes all of them"
            )
        if left_out.total() > rows_in / 2:
            raise UserError(
                f"{source['source']}: {left_out.total():,} of {rows_in:,} rows can't be trained on "
                f"({_listed(left_out)}); more than half is no accident: mend the source. First, {first_left_out}"
            )

    metrics = {"rows_in": rows_in, "kept": kept, "left_out": left_out.total(), **counts}
    write_json(Path("metrics/format.json"), {**metrics, "left_out_by_reason": dict(sorted(left_out.items()))})
    write_csv(LENGTHS, "tokens,examples", ((index * LENGTH_BIN, lengths[index]) for index in range(max(lengths) + 2)))
    summary(
        {
            "rows": f"{rows_in:,} → {kept:,} kept, {left_out.total():,} left out ({_listed(left_out) or 'none'})",
            "tokens": f"{counts['tokens']:,}, of which {counts['supervised_tokens']:,} supervised",
            "truncated": f"{counts['truncated']:,} responses, at max_length = {params.max_length:,}",
        },
        wrote=[FORMATTED_FILE, LEFT_OUT_FILE, "metrics/format.json", LENGTHS],
        then="python -m stages.format --show 3" + (" --left-out" if left_out else ""),
    )


def show(number: int, left_out: bool) -> None:
    """Print the first formatted examples with what is masked and what is supervised, or rows of the ledger."""
    out = console()
    batches = read_batches(LEFT_OUT_FILE if left_out else FORMATTED_FILE)
    rows = list(islice(chain.from_iterable(batch.to_pylist() for batch in batches), number))
    if left_out:
        if not rows:
            out.print(f"{LEFT_OUT_FILE}: no row was left out")
        for row in rows:
            out.print(Text(printable("row {source_row}: {reason}: {detail}".format(**row))))
        return
    tokenizer = load_tokenizer()
    for row in rows:
        table = Table.grid(padding=(0, 2))
        cut = ", cut at max_length" if row["truncated"] else ""
        out.print(Text(f"row {row['source_row']:,}: {len(row['input_ids']):,} tokens{cut}", "bold"))
        tokens = zip(row["input_ids"], row["labels"], strict=True)
        for masked, span in groupby(tokens, key=lambda token: token[1] == NOT_SUPERVISED):
            ids = [token_id for token_id, _ in span]
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            name, style = ("masked", "dim") if masked else ("supervised", "green")
            table.add_row(f"  {name}, {len(ids):,}", Text(printable(text), style))
        out.print(table)


def load_tokenizer() -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    with reading(Path("models/tokenizer")):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained("models/tokenizer", local_files_only=True)
    return tokenizer


def format_batch(
    batch: pa.Table, tokenizer: "PreTrainedTokenizerBase", params: FormatParams
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """A row of `FORMATTED` for each row that can be trained on, a row of `LEFT_OUT` for each other, in order."""
    rows = batch.to_pylist()
    prompts = [render_prompt(params.template, row["instruction"], row["input"]) for row in rows]
    responses = [row["output"].strip() for row in rows]
    prompt_ids = [content_hash(normalise(row["instruction"]), normalise(row["input"])) for row in rows]
    with reading("models/tokenizer", "its tokenizer can't encode this text: use another model"):
        encoded = encode_examples(tokenizer, prompts, responses, params.max_length)
    offsets = pa.array(np.concatenate([[0], encoded.lengths.cumsum()]), pa.int32())
    columns = {
        "example_id": list(map(content_hash, prompt_ids, responses)),
        "prompt_id": prompt_ids,
        "source_row": batch["source_row"],
        "prompt": prompts,
        "response": responses,
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(encoded.input_ids)),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(encoded.labels)),
        "truncated": encoded.truncated,
    }
    kept, left_out = [], []
    for index, (row, response, length) in enumerate(zip(rows, responses, encoded.lengths.tolist(), strict=True)):
        if not row["instruction"].strip():
            left_out.append(_left_out(row, "empty_instruction", "'instruction' is empty"))
        elif not response:
            left_out.append(_left_out(row, "empty_response", "'output' is empty"))
        elif not length:
            detail = f"the prompt leaves no room in max_length = {params.max_length}"
            left_out.append(_left_out(row, "prompt_too_long", detail))
        else:
            kept.append(index)
    return pa.table(columns, FORMATTED).take(pa.array(kept, pa.int64())), left_out


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


def _left_out(row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
    return {"source_row": row["source_row"], "reason": reason, "detail": detail}


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
