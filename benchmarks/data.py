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
from stages.shared.masking import load_tokenizer
from stages.shared.params import FormatParams, load_params
from stages.shared.templates import load_template

JOINED = 3  # rows: about 170 tokens with the template, as in Alpaca


def long_rows(num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of the schema `RAW`, no two alike."""
    lines = Path("data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    choose = random.Random(0)
    for number in range(1, num_rows + 1):
        parts = choose.sample(rows, JOINED)
        fields = {key: "\n".join(row[key] for row in parts if row[key]) for key in ("instruction", "input", "output")}
        messages = [
            {"role": "user", "content": f"{number}. {fields['instruction']}"},
            {"role": "assistant", "content": fields["output"]},
        ]
        yield {"messages": messages, "input": fields["input"], "source": "joined", "source_row": number}


def long_examples(num_examples: int) -> list[Example]:
    """`long_rows`, formatted with the parameters of `params.yaml`."""
    params = load_params(FormatParams)
    template = load_template(params.template, load_tokenizer())
    rows = pa.Table.from_pylist(list(long_rows(num_examples)), RAW)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "long.parquet"
        with parquet_writer(path, FORMATTED) as writer:
            writer.write(format_batch(rows, template, params.max_length)[0])
        return read_split(path)
