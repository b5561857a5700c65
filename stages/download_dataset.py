"""A local file, a Hub dataset or a mixture → `data/raw.parquet`, unreadable rows → `data/unreadable.parquet`.

Where it came from is written to `data/source.json`. Rows stream through: memory does not grow with their number.
"""

import codecs
import csv
import heapq
import json
import re
import reprlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from stages.shared.errors import UserError, reading
from stages.shared.examples import LEFT_OUT, RAW, BadRowError, Message
from stages.shared.files import ROWS_PER_GROUP, file_sha256, parquet_writer, read_batches, write_json
from stages.shared.params import DatasetParams, DownloadDatasetParams, load_params
from stages.shared.run import run
from stages.shared.terminal import bar, summary
from stages.shared.text import printable

# The columns by which a row's form is found, and of these the one that may be missing.
MESSAGES, ALPACA, PROMPT_COMPLETION = ("messages",), ("instruction", "input", "output"), ("prompt", "completion")
FORMS = (MESSAGES, ALPACA, PROMPT_COMPLETION)
OPTIONAL = "input"
ROLES = ("system", "user", "assistant", "tool")
ALLOWED = (
    "every row needs 'instruction' and 'output' (and may have 'input'), or 'prompt' and 'completion', all text, "
    "or 'messages'"
)
MESSAGES_ALLOWED = f"a list of objects with 'role' ({', '.join(ROLES)}) and 'content', both text"
OTHER_DATASET = "use another dataset, one with JSON, CSV or Parquet files"
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
CHARACTERS_AT_ONCE = 2**16
# Integers of thousands of digits are an error to Python, and no text anyway: what stands beside them shall be read.
JSON = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


# A row's number in its source, from 1, and its fields by name or why there are none.
Row = tuple[int, dict[str, Any] | BadRowError]


@dataclass(frozen=True)
class Source:
    """One dataset.

    name: the file or the Hub id.
    rows: its rows, from the first, as often as it is called.
    facts: where it came from, for `data/source.json`.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    facts: dict[str, Any]


def main() -> None:
    params = load_params(DownloadDatasetParams)
    if params.datasets is not None:
        sources = [open_dataset(entry, Path(params.dataset_file)) for entry in params.datasets]
        shares = choose_shares(sources, params.datasets)
        rows = mix(sources, shares)
        facts: dict[str, Any] = {
            **{
                key: ", ".join(str(source.facts[key] or "not stated") for source in sources)
                for key in ("source", "revision", "licence")
            },
            "rows_taken": {source.name: taken for source, (taken, _) in zip(sources, shares, strict=True)},
        }
    else:
        if params.dataset_name is None:
            source = open_file(Path(params.dataset_file))
        else:
            source = open_hub(params.dataset_name, params.dataset_revision, params.dataset_split)
        rows, facts = ((source.name, row) for row in source.rows()), source.facts

    with (
        parquet_writer(Path("data/raw.parquet"), RAW) as raw,
        parquet_writer(Path("data/unreadable.parquet"), LEFT_OUT) as unreadable,
    ):
        rows = iter(bar(islice(rows, params.max_examples), "read", "row", params.max_examples))
        while batch := list(islice(rows, ROWS_PER_GROUP)):
            readable, bad = [], []
            for name, (source_row, row) in batch:
                place = {"source": name, "source_row": source_row}
                try:
                    messages, text = read_fields(row)
                    readable.append({"messages": messages, "input": text, **place})
                except BadRowError as error:
                    bad.append({**place, "reason": error.reason, "detail": str(error)})
            raw.write(readable)
            unreadable.write(bad)
        num_rows = raw.num_rows + unreadable.num_rows
        if num_rows == 0:
            raise UserError(f"{facts['source']}: found no rows; {ALLOWED}")
    write_json(Path("data/source.json"), {**facts, "rows": num_rows})
    summary(
        {"source": facts["source"], "rows": f"{raw.num_rows:,} read, {unreadable.num_rows:,} unreadable"},
        wrote=["data/raw.parquet", "data/unreadable.parquet", "data/source.json"],
        then="dvc repro format; then python -m stages.format --show 3",
    )


def open_dataset(entry: DatasetParams, folder: Path) -> Source:
    """A dataset of a mixture. Its files lie in a folder that DVC hashes whole."""
    if entry.file is None:
        return open_hub(str(entry.name), entry.revision, entry.split)
    if not folder.is_dir():
        raise UserError(
            f"dataset_file: found {str(folder)!r}; must be the folder of the files in `datasets`, so that DVC sees "
            "when one of them changes"
        )
    return open_file(folder / entry.file)


def choose_shares(sources: list[Source], entries: list[DatasetParams]) -> list[tuple[int, int]]:
    """Of each source how many rows to take, and how many it has.

    By weights, the mixture is as large as it can be without a row twice.

    Raises:
        UserError: a source has fewer rows than its count, or none.
    """
    sizes = [sum(1 for _ in source.rows()) for source in sources]
    for source, entry, size in zip(sources, entries, sizes, strict=True):
        if size < (entry.count or 1):
            raise UserError(
                f"datasets: {source.name} has {size:,} rows; must have {entry.count or 1:,}: lower its count"
            )
    largest = min((size / entry.weight for entry, size in zip(entries, sizes, strict=True) if entry.weight), default=0)
    return [
        (min(size, max(1, round(largest * entry.weight))) if entry.weight else entry.count or size, size)
        for entry, size in zip(entries, sizes, strict=True)
    ]


def mix(sources: list[Source], shares: list[tuple[int, int]]) -> Iterator[tuple[str, Row]]:
    """Rows evenly from the whole of each source, in one order: any stretch of the mixture has about its proportions."""

    def placed(index: int) -> Iterator[tuple[float, int, tuple[str, Row]]]:
        (taken, size), source = shares[index], sources[index]
        number = 0
        for at, row in enumerate(source.rows()):
            if (at + 1) * taken // size > number:
                yield (number + 0.5) / taken, index, (source.name, row)
                number += 1

    for _, _, row in heapq.merge(*map(placed, range(len(sources))), key=lambda entry: entry[:2]):
        yield row


def read_fields(row: dict[str, Any] | BadRowError) -> tuple[list[Message], str]:
    """The turns of one row, and Alpaca's input.

    Raises:
        BadRowError: a field is missing or is no Unicode text.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, dict):
        raise BadRowError("not_an_object", f"found {_shown(row)}; {ALLOWED}")
    form = find_form([name for name, value in row.items() if value is not None])
    if form == MESSAGES:
        return _read_messages(row["messages"]), ""
    texts = []
    for name in form:
        value = row.get(name)
        if value is None and name != OPTIONAL:
            raise BadRowError("missing_field", f"{name!r} is missing; {ALLOWED}")
        texts.append(_text(repr(name), "" if value is None else value, ALLOWED))
    question, *text, answer = texts
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "".join(text)


def find_form(columns: Iterable[str]) -> tuple[str, ...]:
    """The first form that is there whole; else the one that was meant, to say what is missing."""
    names = set(columns)
    whole = [form for form in FORMS if names.issuperset(name for name in form if name != OPTIONAL)]
    meant = PROMPT_COMPLETION if names.intersection(PROMPT_COMPLETION) and not names.intersection(ALPACA) else ALPACA
    return [*whole, meant][0]


def _read_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise BadRowError("not_text", f"'messages' is {_shown(messages)}; must be {MESSAGES_ALLOWED}")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRowError("not_text", f"message {number} is {_shown(message)}; must be {MESSAGES_ALLOWED}")
        for name in ("role", "content"):
            if message.get(name) is None:
                detail = f"{name!r} of message {number} is missing; must be {MESSAGES_ALLOWED}"
                raise BadRowError("missing_field", detail)
        role, content = (
            _text(f"{name!r} of message {number}", message[name], f"must be {MESSAGES_ALLOWED}")
            for name in ("role", "content")
        )
        if role not in ROLES:
            raise BadRowError(
                "unknown_role", f"'role' of message {number} is {_shown(role)}; must be {MESSAGES_ALLOWED}"
            )
        turns.append({"role": role, "content": content})
    return turns


def _text(what: str, value: object, allowed: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("not_text", f"{what} is {_shown(value)}; {allowed}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("not_unicode", f"{what} has half a surrogate pair at character {error.start}") from None
    return value


def _shown(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value).encode('ascii', 'backslashreplace').decode():.60}"


def open_file(path: Path) -> Source:
    """A JSON, JSONL, CSV or Parquet file.

    Raises:
        UserError: the file as a whole can't be read: not there, another format or encoding, a column missing.
    """
    readers = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"dataset_file: found {str(path)!r}; must end in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"dataset_file: {str(path)!r} is not a file; name one, or a Hub dataset in dataset_name")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty; {ALLOWED}")
    read = readers[path.suffix.lower()]
    facts = {"source": str(path), "revision": f"sha256:{file_sha256(path)}", "licence": None}
    return Source(str(path), lambda: read(path), facts)


def read_json(path: Path) -> Iterator[Row]:
    """One array of objects, or an object a line: told apart by the first character, whatever the file's name."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return read_json_array(path) if head.startswith(b"[") else read_json_lines(path)


def read_json_array(path: Path) -> Iterator[Row]:
    """The elements of an array one by one, so that memory holds the longest and not all of them.

    Not with ijson: its parser turns half a surrogate pair into a question mark, and ends at an integer of 20 digits.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, element in enumerate(_array_elements(file), 1):
                yield number, element
    except RecursionError:
        raise UserError(f"{path}: row {number + 1} is nested too deep; {ALLOWED}") from None
    except (ValueError, IndexError):
        # Where it is in the file is found by reading all of it again, which costs memory only on the way out.
        with path.open("rb") as again:
            text = "".join(_decoded_lines(path, again))
        try:
            JSON.decode(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; mend that line"
            ) from None
        raise


def _array_elements(file: TextIO) -> Iterator[Any]:
    text, at = file.read(CHARACTERS_AT_ONCE).lstrip().removeprefix("["), 0
    empty = True
    while True:
        try:
            start = WHITE_SPACE.search(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if empty and text[start] == "]":
                after = start
                break
            element, end = JSON.raw_decode(text, start)
            after = WHITE_SPACE.search(text, end).end()  # type: ignore[union-attr]
            separator = text[after]
            if separator not in ",]":  # what is here of a number may be its beginning
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        except (json.JSONDecodeError, IndexError):
            # More of the file makes it whole, or it is wrong.
            if not (more := file.read(max(len(text) - at, CHARACTERS_AT_ONCE))):
                raise
            text, at = text[at:] + more, 0
            continue
        yield element
        empty = False
        if separator == "]":
            break
        at = after + 1
    if text[after + 1 :].strip() or file.read().strip():
        raise json.JSONDecodeError("Extra data", text, after)


def read_json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _wrong_encoding(path, number, error) from None
            if text.strip():
                try:
                    yield number, JSON.decode(text.rstrip("\r\n"))
                except (json.JSONDecodeError, RecursionError) as error:
                    yield number, BadRowError("bad_json", f"{path}:{number}: not valid JSON: {error}")


def read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open("rb") as file:
        reader = csv.DictReader(_decoded_lines(path, file), strict=True)
        try:
            _require_columns(path, reader.fieldnames or ())
            for number, row in enumerate(reader, 1):
                if None in row:
                    width = len(reader.fieldnames or ())
                    yield (
                        number,
                        BadRowError("extra_fields", f"line {reader.line_num}: more than the header's {width} fields"),
                    )
                else:
                    yield number, row
        except csv.Error as error:
            raise UserError(
                f'{path}:{reader.line_num + 1}: not valid CSV: {error}; quote fields with " and double it inside'
            ) from None


def _decoded_lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, number, error) from None


def read_parquet(path: Path) -> Iterator[Row]:
    with reading(path):
        schema = pq.read_schema(path)
        _require_columns(path, schema.names)
        columns = [name for name in schema.names if any(name in form for form in FORMS)]
        rows = (row for batch in read_batches(path, columns) for row in batch.to_pylist())
        yield from enumerate(rows, 1)


def open_hub(name: str, revision: str | None, split: str) -> Source:
    """A Hub dataset; its facts have the revision resolved to a commit, and the licence."""
    import datasets
    from huggingface_hub import HfApi

    from stages.shared.hub import hub_errors

    where = f"dataset_name: {name!r}"
    if Path(name).exists():  # load_dataset would read that, whatever the Hub has
        raise UserError(f"{where} is also a path here; rename that, or name a file in dataset_file")
    with reading(where, OTHER_DATASET), hub_errors("dataset_name", name, revision):
        info = HfApi().dataset_info(name, revision=revision)
        try:
            dataset = datasets.load_dataset(name, revision=info.sha, split=split)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None
        licence = info.card_data.get("license") if info.card_data else None
        licence = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
    _require_columns(name, dataset.column_names)
    facts = {"source": name, "split": split, "revision": info.sha, "licence": licence and printable(str(licence))}
    return Source(name, lambda: _numbered(where, dataset), facts)


def _numbered(where: str, dataset: Iterable[dict[str, Any]]) -> Iterator[Row]:
    with reading(where, OTHER_DATASET):
        yield from enumerate(dataset, 1)


def _require_columns(where: object, columns: Iterable[str]) -> None:
    names = list(columns)
    for name in find_form(names):
        if name != OPTIONAL and name not in names:
            found = textwrap.shorten(", ".join(names), 300, placeholder=" ...") or "none"
            raise UserError(f"{where}: column {name!r} is missing; found {found}; {ALLOWED}")
        if names.count(name) > 1:
            raise UserError(f"{where}: column {name!r} is there {names.count(name)} times; keep one of them")


def _wrong_encoding(path: Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{path}:{line}: not UTF-8: found byte 0x{byte:02x}; save the file as UTF-8 and run again")


if __name__ == "__main__":
    run(main)
