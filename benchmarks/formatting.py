"""Measure the time of the format stage, compared with that of a bare call of the tokenizer."""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from benchmarks.data import write_project
from stages.data.tables import ROWS_PER_GROUP
from stages.templates.alpaca import render_alpaca

ALPACA_ROWS = 52_000
REPEATS = 3


def measure() -> dict[str, Any]:
    """Seconds of the stage and of the tokenizer, measured alternately, for as many rows as Alpaca has."""
    with TemporaryDirectory() as small, TemporaryDirectory() as large:
        for folder, num_rows in ((small, 1), (large, ALPACA_ROWS)):
            write_project(Path(folder), num_rows)
            run_stage("download_dataset", folder)
        start_up = [run_stage("format", small) for _ in range(REPEATS)]
        stage, tokenizer = [], []
        for _ in range(REPEATS):
            stage.append(run_stage("format", large))
            tokenizer.append(tokenizer_seconds(Path(large)))
            print(f"format, {ALPACA_ROWS:,} rows: {stage[-1]:.1f} s, bare tokenizer {tokenizer[-1]:.1f} s", flush=True)
    return {
        "rows": ALPACA_ROWS,
        "start_up_seconds": start_up,
        "stage_seconds": stage,
        "tokenizer_seconds": tokenizer,
    }


def run_stage(stage: str, folder: str) -> float:
    """Seconds of a stage."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
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
