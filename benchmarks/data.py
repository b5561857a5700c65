"""Rows to measure with: the shipped instructions as they are, and three of them joined into a long one."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from stages.format import format_batch
from stages.shared.examples import FORMATTED, RAW, Example, read_split
from stages.shared.files import parquet_writer
from stages.shared.params import FormatParams, load_params

JOINED = 3  # rows: about 170 tokens with the template, as in Alpaca


def long_rows(num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of the schema `RAW`, no two alike."""
    lines = Path("data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    choose = random.Random(0)
    for number in range(1, num_rows + 1):
        parts = choose.sample(rows, JOINED)
        fields = {key: "\n".join(row[key] for row in parts if row[key]) for key in ("instruction", "input", "output")}
        yield {**fields, "instruction": f"{number}. {fields['instruction']}", "source_row": number}


def long_examples(num_examples: int) -> list[Example]:
    """`long_rows`, formatted with the parameters of `params.yaml`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("models/tokenizer")
    rows = pa.Table.from_pylist(list(long_rows(num_examples)), RAW)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "long.parquet"
        with parquet_writer(path, FORMATTED) as writer:
            writer.write(format_batch(rows, tokenizer, load_params(FormatParams))[0])
        return read_split(path)
