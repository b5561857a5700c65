"""Long rows for the benchmarks, made of the instructions in this repository, and projects with such rows."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.data.examples import EXAMPLE_SCHEMA, RAW_SCHEMA, Example
from stages.data.tokenizer import load_tokenizer
from stages.format import format_batch
from stages.runtime.params import FormatParams, load_params
from stages.templates.selection import load_template

JOINED = 3, 3  # instructions and outputs per row; about 170 tokens with the template
ALPACA = 1, 5  # about 170 tokens, of which 70% are supervised, as in the rows of Alpaca
LINKS = ("params.yaml", "templates", "models/tokenizer")


def long_rows(num_rows: int, joined: tuple[int, int] = JOINED) -> Iterator[dict[str, str]]:
    """Rows with `instruction`, `input` and `output`, all different, each made of several rows of the repository."""
    lines = Path("data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    choose = random.Random(0)
    for number in range(1, num_rows + 1):
        num_instructions, num_outputs = joined
        parts = choose.sample(rows, max(joined))
        numbers = {"instruction": num_instructions, "input": num_instructions, "output": num_outputs}
        fields = {key: "\n".join(row[key] for row in parts[:count] if row[key]) for key, count in numbers.items()}
        yield fields | {"instruction": f"{number}. {fields['instruction']}"}


def long_examples(num_examples: int, joined: tuple[int, int] = JOINED) -> list[Example]:
    """`long_rows`, formatted with the parameters of `params.yaml`."""
    params = load_params(FormatParams)
    template = load_template(params.template, load_tokenizer(), params.template_options, params.reasoning_end)
    rows = []
    for number, row in enumerate(long_rows(num_examples, joined), 1):
        question = {"role": "user", "content": row["instruction"]}
        messages = json.dumps([question, {"role": "assistant", "content": row["output"]}])
        rows.append({"messages": messages, "input": row["input"], "source": "joined", "source_row": number})
    return read_examples(format_batch(pa.Table.from_pylist(rows, RAW_SCHEMA), template, params).examples)


def read_examples(table: pa.Table) -> list[Example]:
    """The examples of a formatted table."""
    return [
        Example(row["example_id"], np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32))
        for row in table.select(EXAMPLE_SCHEMA.names).to_pylist()
    ]


def write_project(folder: Path, num_rows: int, links: Sequence[str] = LINKS) -> None:
    """Write the inputs of the data stages to an empty folder: new rows, and links to files of the workspace."""
    for name in links:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(Path(name).absolute())
    (folder / "data").mkdir()
    (folder / "data/retention.jsonl").touch()
    with (folder / "data/instructions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in long_rows(num_rows))
