"""Reader of tables of text: CSV and TSV files. Rows are streamed."""

import csv
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from stages.data.examples import BadRowError
from stages.rows.row_parser import Row, RowParser
from stages.rows.text_files import decoded_lines, open_binary
from stages.runtime.errors import UserError

DELIMITERS = (",", ";", "\t", "|")
EXCEL_DELIMITER = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # the first line of some files for Excel
OTHER_FORMAT = "save the file as JSON Lines, as docs/data.md shows"


@dataclass(frozen=True)
class Record:
    """A row, or the header.

    fields: what delimiters and quotes separate.
    lines: those of the file that it spans, of which the first has the number `start`.
    delimiter: the one of the file.
    """

    fields: list[str]
    lines: list[str]
    start: int
    delimiter: str

    def widths(self) -> list[int]:
        """The number of fields of each line that is not blank, if quotes are plain characters."""
        return [line.count(self.delimiter) + 1 for line in self.lines if line.strip()]


def read_csv(path: Path, slice_column: str, parser: RowParser) -> Iterator[Row]:
    """Read a file with a header. A row with more or fewer fields than the header gives a `BadRowError`.

    Raises:
        UserError: the file is not valid CSV, or a quoted field may be several rows.
    """
    records = _records(path)
    header = next(records, None)
    names = [name.strip() or f"unnamed {number}" for number, name in enumerate(header.fields if header else (), 1)]
    try:
        parser.require_columns(path, names)
    except UserError as error:
        if len(names) != 1:
            raise
        raise UserError(f"{error}; columns must be separated by commas, semicolons, tabs or vertical bars") from None
    width, are_quoted = len(names), False
    for number, record in enumerate(records, 1):
        if not are_quoted and width in record.widths()[1:]:
            are_quoted = _has_quoted_fields(path)
            if not are_quoted:
                end = record.start + len(record.lines) - 1
                raise UserError(
                    f"{path}:{record.start}: a quoted field begins here and ends in line {end}, but lines in it can "
                    "also be rows, with quotes as plain characters; if quotes enclose fields, quote the names in the "
                    f"header, too; if not, {OTHER_FORMAT}"
                )
        if (found := len(record.fields)) == width:
            yield number, dict(zip(names, record.fields, strict=True))
        else:
            detail = f"line {record.start}: {found} fields, but the header has {width}"
            yield number, BadRowError("extra_fields" if found > width else "missing_fields", detail)


def _has_quoted_fields(path: Path) -> bool:
    """Whether quotes are not plain characters: some are in the header, or the rows are rows only because of them."""
    records = _records(path)
    header = next(records)
    width = len(header.fields)
    return '"' in "".join(header.lines) or any(
        len(record.fields) == width and record.widths() != [width] and width not in record.widths()[1:]
        for record in records
    )


def _records(path: Path) -> Iterator[Record]:
    """The header, which shows the delimiter and whether spaces follow it, and the rows; not blank lines.

    Raises:
        UserError: the file is not valid CSV.
    """
    csv.field_size_limit(sys.maxsize)
    with open_binary(path) as file:
        lines = decoded_lines(path, file)
        start, header = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (1, ""))
        if excel := EXCEL_DELIMITER.fullmatch(header):
            start, header = start + 1, next(lines, "")
        if "\r" in header.rstrip("\r\n"):
            raise UserError(f"{path}:{start}: lines end with a carriage return only; save the file with line feeds")
        widths = {name: len(next(csv.reader([header], delimiter=name))) for name in DELIMITERS}
        delimiter = excel[1] if excel else max(DELIMITERS, key=widths.__getitem__)
        has_spaces = {*re.findall(f"{re.escape(delimiter)}(.?)", header)} == {" "}
        taken: list[str] = []

        def recorded() -> Iterator[str]:
            for line in chain([header], lines):
                taken.append(line)
                yield line

        reader = csv.reader(recorded(), delimiter=delimiter, skipinitialspace=has_spaces, strict=True)
        try:
            for fields in reader:
                if fields:
                    yield Record(fields, taken.copy(), start, delimiter)
                start += len(taken)
                taken.clear()
        except csv.Error as error:
            reason = "a carriage return outside quotes" if "new-line" in str(error) else error
            raise UserError(
                f'{path}:{start}: not valid CSV: {reason}; quote fields with " and double it inside, or {OTHER_FORMAT}'
            ) from None
