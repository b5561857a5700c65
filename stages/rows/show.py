"""Print what rows become, for `python -m stages.format --show`: columns, formatted examples and rejected rows."""

import json
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from stages.data.examples import IGNORE_INDEX, BadRowError
from stages.data.tables import read_batches
from stages.data.tokenizer import load_tokenizer
from stages.rows.row_parser import ALLOWED
from stages.rows.sources import open_sources
from stages.runtime.errors import UserError
from stages.runtime.params import DownloadDatasetParams, load_params
from stages.runtime.terminal import console
from stages.text import printable


def describe(row: dict[str, Any]) -> str:
    """One line about a rejected row."""
    return "{source}, row {source_row:,}: {reason}: {detail}".format(**row)


def show_rejected(path: Path, number: int) -> None:
    """Print the first rejected rows and their reasons."""
    out = console()
    rows = list(islice(chain.from_iterable(batch.to_pylist() for batch in read_batches(path)), number))
    for row in rows:
        out.print(Text(printable(describe(row))))
    if not rows:
        out.print(f"{path}: no row was rejected")


def show_formatted(path: Path, number: int) -> None:
    """Print the first formatted examples: which text is masked and which is supervised."""
    out, tokenizer = console(), load_tokenizer()
    for row in islice(chain.from_iterable(batch.to_pylist() for batch in read_batches(path)), number):
        table = Table.grid(padding=(0, 2))
        cut = ", cut at max_length" if row["truncated"] else ""
        out.print(Text(f"{row['source']}, row {row['source_row']:,}: {len(row['input_ids']):,} tokens{cut}", "bold"))
        tokens = zip(row["input_ids"], row["labels"], strict=True)
        for masked, span in groupby(tokens, key=lambda token: token[1] == IGNORE_INDEX):
            ids = [token_id for token_id, _ in span]
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            name, style = ("masked", "dim") if masked else ("supervised", "green")
            table.add_row(f"  {name}, {len(ids):,}", Text(printable(text), style))
        out.print(table)


def show_columns() -> None:
    """Print what the columns of each dataset become, with its first row, before a template renders it."""
    out = console()
    for source in open_sources(load_params(DownloadDatasetParams)):
        number, row = next(source.rows(), (0, None))
        if row is None:
            raise UserError(f"{source.name}: has no rows; {ALLOWED}")
        table = Table.grid(padding=(0, 2))
        out.print(Text(f"{source.name}, row {number:,}", "bold"))
        try:
            parsed = source.parser.parse(row)
        except BadRowError as error:
            out.print(Text(printable(f"  {error.reason}: {error}")))
            continue
        assert isinstance(row, dict)  # noqa: S101  (otherwise it can't be parsed)
        for name, meaning in source.parser.meanings([*row]).items():
            table.add_row(f"  {printable(name)}", meaning, style="dim" if meaning == "not read" else "")
        for tool in parsed.tools:
            table.add_row("  → tool", Text(printable(json.dumps(tool["function"], ensure_ascii=False))))
        for message in parsed.messages:
            trained = message["role"] == "text" or (message["role"] == "assistant" and message.get("train", True))
            stated = {name: value for name, value in message.items() if name not in ("role", "train") and value}
            content = stated.pop("content", "")
            text = "\n".join([content, *(f"{name}: {json.dumps(stated[name], ensure_ascii=False)}" for name in stated)])
            table.add_row(f"  → {message['role']}", Text(printable(text.strip()), "green" if trained else "dim"))
        out.print(table)
