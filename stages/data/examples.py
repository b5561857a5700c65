"""The schemas of the tables that stages exchange, and the examples of a split."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.data.tables import read_batches
from stages.runtime.errors import UserError, user_errors

# source: a file or Hub id. source_row: counts from 1; for JSONL, the line number.
RAW_SCHEMA = pa.schema(
    [
        # As JSON text, because the keys of messages differ and the arguments of tools can have any structure.
        ("messages", pa.string()),
        ("tools", pa.string()),  # null if the row has none
        ("chat_template_kwargs", pa.string()),  # options of the chat template, as JSON; null if the row has none
        ("input", pa.string()),  # the `input` of Alpaca rows
        ("slice", pa.string()),  # the value of `slice_column`
        ("check", pa.string()),  # the check of the last answer, as JSON; null if the row has none
        ("other_columns", pa.string()),  # those that are not trained on, as JSON, for scorers
        ("use", pa.string()),  # the split that the dataset is used for; null: by the hash of the prompt
        ("source", pa.string()),
        ("source_row", pa.int64()),
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
SPLIT_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("slice", pa.string()),
        ("use", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
    ]
)
SCORING_FIELDS = [RAW_SCHEMA.field(name) for name in ("check", "other_columns")]
FORMATTED_SCHEMA = pa.schema(
    [
        *SPLIT_SCHEMA,
        *SCORING_FIELDS,
        ("questions", pa.list_(pa.string())),  # the user messages, the first with the `input`; or the plain text
        ("prompt_tokens", pa.int32()),  # masked tokens before truncation
        ("answer_tokens", pa.int32()),  # supervised tokens before truncation
    ]
)
# How the answers of the test and retention splits are scored. It is a table of its own, so that editing a check neither
# trains nor generates answers again.
SCORING_SCHEMA = pa.schema([("split", pa.string()), ("example_id", pa.string()), *SCORING_FIELDS])
EXAMPLE_SCHEMA = pa.schema([FORMATTED_SCHEMA.field(name) for name in ("example_id", "input_ids", "labels")])
IGNORE_INDEX = -100  # the label of tokens that are not trained
Message = dict[str, Any]  # see stages.rows.row_parser.ParsedRow


class BadRowError(Exception):
    """A row that can't be trained on. It goes to the rejected rows with its reason; the other rows are kept."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """One formatted example. input_ids and labels: int32 (tokens,); labels are -100 where not supervised."""

    example_id: str
    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first supervised one."""
        return int((self.labels != IGNORE_INDEX).argmax())

    @property
    def last_response(self) -> int:
        """The index of the first token of the last response; the tokens before it are the prompt for generation."""
        supervised = self.labels != IGNORE_INDEX
        return int(np.flatnonzero(supervised[1:] > supervised[:-1])[-1]) + 1

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


class Split(Sequence[Example]):
    """The examples of a split, memory-mapped, so that its size is not limited by memory.

    Parquet is compressed, so the columns are first copied to a file (8 bytes per token). It has no name, so nothing is
    left of it when the process ends.
    """

    def __init__(self, path: Path):
        folder = Path(".scratch")  # on a disk, unlike the folder for temporary files, which can be in memory
        folder.mkdir(exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            with user_errors(path), pa.ipc.new_file(file, EXAMPLE_SCHEMA) as writer:
                for batch in read_batches(path, EXAMPLE_SCHEMA.names):
                    writer.write(batch)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._columns = pa.ipc.open_file(pa.py_buffer(mapped)).read_all().columns

    def __len__(self) -> int:
        return len(self._columns[0])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        example_id, input_ids, labels = (column[index] for column in self._columns)
        return Example(example_id.as_py(), input_ids.values.to_numpy(), labels.values.to_numpy())


def read_split(path: Path) -> Split:
    """Open a split.

    Raises:
        UserError: the split has no examples or can't be read.
    """
    split = Split(path)
    if not len(split):
        raise UserError(f"{path}: has no examples; run `dvc repro`, or add rows to the dataset")
    return split
