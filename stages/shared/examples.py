"""The tables that stages hand to each other, and reading a split of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.shared.errors import UserError
from stages.shared.files import read_table

# source: the file or Hub id. source_row counts from 1; in a JSONL file it is the line.
RAW = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("input", pa.string()),  # what Alpaca's form sets beside the instruction
        ("source", pa.string()),
        ("source_row", pa.int64()),
    ]
)
LEFT_OUT = pa.schema(
    [
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
FORMATTED = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
    ]
)
NOT_SUPERVISED = -100
Message = dict[str, str]  # role: system, user, assistant or tool; content


class BadRowError(Exception):
    """A row that can't be trained on. It goes to the ledger, the others go on."""

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
        """Tokens before the first supervised one."""
        return int((self.labels != NOT_SUPERVISED).argmax())

    @property
    def last_response(self) -> int:
        """Where the last response begins: the tokens before it are what the model is asked with."""
        supervised = self.labels != NOT_SUPERVISED
        return int(np.flatnonzero(supervised[1:] > supervised[:-1])[-1]) + 1

    @property
    def num_supervised(self) -> int:
        return int((self.labels != NOT_SUPERVISED).sum())


def read_split(path: Path) -> list[Example]:
    """The examples of a split, as views of its columns: 8 bytes a token."""
    examples: list[Example] = []
    for batch in read_table(path, ["example_id", "input_ids", "labels"]).to_batches():
        columns = [batch.column(name) for name in ("input_ids", "labels")]
        views = [
            np.split(column.flatten().to_numpy(), column.value_lengths().to_numpy().cumsum()[:-1]) for column in columns
        ]
        examples += map(Example, batch.column("example_id").to_pylist(), *views)
    if not examples:
        raise UserError(f"{path}: has no examples; run `dvc repro`, or bring more rows")
    return examples
