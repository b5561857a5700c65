"""The schemas of the tables that stages exchange, and the examples of a split."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.data.tables import read_table
from stages.runtime.errors import UserError

# source: a file or Hub id. source_row: counts from 1; for JSONL, the line number.
RAW_SCHEMA = pa.schema(
    [
        # As JSON text, because the keys of messages differ and the arguments of tools can have any structure.
        ("messages", pa.string()),
        ("tools", pa.string()),  # null if the row has none
        ("input", pa.string()),  # the `input` of Alpaca rows
        ("slice", pa.string()),  # the value of `slice_column`
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
FORMATTED_SCHEMA = pa.schema(
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
IGNORE_INDEX = -100  # the label of tokens that are not trained
Message = dict[str, Any]  # see stages.data.rows.ParsedRow


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


def read_split(path: Path) -> list[Example]:
    """Read the examples of a split. Their arrays are views of the table's columns (8 bytes per token).

    Raises:
        UserError: the split has no examples or can't be read.
    """
    examples: list[Example] = []
    for batch in read_table(path, ["example_id", "input_ids", "labels"]).to_batches():
        columns = [batch.column(name) for name in ("input_ids", "labels")]
        views = [
            np.split(column.flatten().to_numpy(), column.value_lengths().to_numpy().cumsum()[:-1]) for column in columns
        ]
        examples += map(Example, batch.column("example_id").to_pylist(), *views)
    if not examples:
        raise UserError(f"{path}: has no examples; run `dvc repro`, or add rows to the dataset")
    return examples
