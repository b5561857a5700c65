"""The format stage against the bare tokenizer, and how its time and memory grow with the rows."""

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
from benchmarks.memory import peak_memory
from stages.shared.examples import LEFT_OUT, RAW
from stages.shared.files import ROWS_PER_GROUP, parquet_writer, write_json
from stages.shared.templates import render_alpaca

ALPACA_ROWS = 52_000
GROWTH = (1_000, 10_000, 100_000, 1_000_000)
REPEATS = 3


def measure() -> dict[str, Any]:
    """Seconds of the stage and of the tokenizer, in turns, for as many rows as Alpaca has; the growth of the stage."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, 1)
        start_up = [run_stage(folder)["seconds"] for _ in range(REPEATS)]
        prepare(folder, ALPACA_ROWS)
        stage, tokenizer = [], []
        for _ in range(REPEATS):
            stage.append(run_stage(folder)["seconds"])
            tokenizer.append(tokenizer_seconds(folder))
            print(f"format, {ALPACA_ROWS:,} rows: {stage[-1]:.1f} s, bare tokenizer {tokenizer[-1]:.1f} s", flush=True)
        growth = []
        for num_rows in GROWTH:
            prepare(folder, num_rows)
            growth.append({"rows": num_rows, **run_stage(folder)})
            print(f"format, {num_rows:,} rows: {growth[-1]['seconds']:.1f} s", flush=True)
    return {
        "rows": ALPACA_ROWS,
        "start_up_seconds": start_up,
        "stage_seconds": stage,
        "tokenizer_seconds": tokenizer,
        "growth": growth,
    }


def prepare(folder: Path, num_rows: int) -> None:
    """Write all that the format stage reads."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(name, folder)
    (folder / "models").mkdir(exist_ok=True)
    if not (folder / "models/tokenizer").exists():
        (folder / "models/tokenizer").symlink_to(Path("models/tokenizer").absolute())
    with parquet_writer(folder / "data/raw.parquet", RAW) as writer:
        rows = long_rows(num_rows)
        while some := list(islice(rows, ROWS_PER_GROUP)):
            writer.write(some)
    with parquet_writer(folder / "data/unreadable.parquet", LEFT_OUT):
        pass
    write_json(folder / "data/source.json", {"source": "joined", "revision": None, "licence": None, "rows": num_rows})


def run_stage(folder: Path) -> dict[str, Any]:
    """Seconds and peak memory (bytes) of the process `python -m stages.format`."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "stages.format"], cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"stages.format exited with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}


def tokenizer_seconds(folder: Path) -> float:
    """Seconds of `tokenizers` alone for the same prompts and responses: its fastest call, on all cores."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "models/tokenizer/tokenizer.json"))
    rows = pq.read_table(folder / "data/raw.parquet").to_pylist()
    texts = [render_alpaca(row["messages"][0]["content"], row["input"]) for row in rows]
    texts += [row["messages"][1]["content"] for row in rows]
    start = time.perf_counter()
    for first in range(0, len(texts), ROWS_PER_GROUP):
        encodings = tokenizer.encode_batch_fast(texts[first : first + ROWS_PER_GROUP], add_special_tokens=False)
        _ = [encoding.ids for encoding in encodings]
    return time.perf_counter() - start
