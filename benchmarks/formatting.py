"""Measure the time of the format stage, compared with that of a bare call of the tokenizer."""

import json
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from benchmarks.data import long_rows
from stages.data.examples import RAW_SCHEMA, REJECTED_SCHEMA
from stages.data.tables import ROWS_PER_GROUP, parquet_writer
from stages.templates.alpaca import render_alpaca

ALPACA_ROWS = 52_000
REPEATS = 3


def measure() -> dict[str, Any]:
    """Seconds of the stage and of the tokenizer, measured alternately, for as many rows as Alpaca has."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, 1)
        start_up = [run_stage(folder) for _ in range(REPEATS)]
        prepare(folder, ALPACA_ROWS)
        stage, tokenizer = [], []
        for _ in range(REPEATS):
            stage.append(run_stage(folder))
            tokenizer.append(tokenizer_seconds(folder))
            print(f"format, {ALPACA_ROWS:,} rows: {stage[-1]:.1f} s, bare tokenizer {tokenizer[-1]:.1f} s", flush=True)
    return {
        "rows": ALPACA_ROWS,
        "start_up_seconds": start_up,
        "stage_seconds": stage,
        "tokenizer_seconds": tokenizer,
    }


def prepare(folder: Path, num_rows: int) -> None:
    """Write the inputs of the format stage."""
    shutil.copy("params.yaml", folder)
    (folder / "models").mkdir(exist_ok=True)
    if not (folder / "models/tokenizer").exists():
        (folder / "models/tokenizer").symlink_to(Path("models/tokenizer").absolute())
    with parquet_writer(folder / "data/raw.parquet", RAW_SCHEMA) as writer:
        rows = long_rows(num_rows)
        while batch := list(islice(rows, ROWS_PER_GROUP)):
            writer.write(batch)
    with parquet_writer(folder / "data/unreadable.parquet", REJECTED_SCHEMA):
        pass


def run_stage(folder: Path) -> float:
    """Seconds of `python -m stages.format`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stages.format"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def tokenizer_seconds(folder: Path) -> float:
    """Seconds of the fastest call of `tokenizers`, on all cores, for the same prompts and responses."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "models/tokenizer/tokenizer.json"))
    rows = pq.read_table(folder / "data/raw.parquet").to_pylist()
    messages = [json.loads(row["messages"]) for row in rows]
    texts = [
        render_alpaca(question["content"], row["input"]) for (question, _), row in zip(messages, rows, strict=True)
    ]
    texts += [answer["content"] for _, answer in messages]
    start = time.perf_counter()
    for first in range(0, len(texts), ROWS_PER_GROUP):
        encodings = tokenizer.encode_batch_fast(texts[first : first + ROWS_PER_GROUP], add_special_tokens=False)
        _ = [encoding.ids for encoding in encodings]
    return time.perf_counter() - start
