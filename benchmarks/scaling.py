"""Measure time and memory of the data stages by number of rows: `python -m benchmarks.scaling`.

Writes `benchmarks/scaling.json`; `benchmarks.costs` turns it into the tables of `docs/scaling.md`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks import training
from benchmarks.__main__ import machine
from benchmarks.costs import RESULTS, STAGES, report
from benchmarks.data import long_examples, write_project
from benchmarks.memory import ANONYMOUS, PEAK, process_memory
from stages.data.files import write_json
from stages.data.tables import ROWS_PER_SHARD
from stages.engine.models import pick_device, uses_bf16
from stages.engine.schedule import effective_batch_size
from stages.runtime.params import TrainParams, load_params
from stages.runtime.terminal import disk_usage

ROWS = [count * ROWS_PER_SHARD for count in (1, 2, 4, 8, 16)]
TABLES = ("raw", "formatted", "train", "validation", "test")
# What `train` does with its split besides the model: look at all examples, and order an epoch.
READ_TRAIN = """
from pathlib import Path
from stages.data.examples import read_split
from stages.engine.batches import Limits, shuffled_batches
from stages.engine.probe import scan_examples
train = read_split(Path("data/train.parquet"))
scan_examples(train, Limits(1024, 1024))
next(shuffled_batches(train, 16, 0, 0))
"""
CORES_ROWS, REPEATS = 2 * ROWS_PER_SHARD, 2  # for the comparison of one core with all cores


def main() -> None:
    results = machine() | {"curve": curve(), "one_core": one_core(), "training": gpt2()}
    write_json(RESULTS, results)
    print(report(results))


def curve() -> list[dict[str, Any]]:
    """Time, peak memory and output size of each data stage, for each number of rows."""
    points = []
    for num_rows in ROWS:
        with TemporaryDirectory() as name:
            folder = Path(name)
            write_project(folder, num_rows)
            point: dict[str, Any] = {"rows": num_rows}
            for stage in STAGES:
                point[stage] = run([sys.executable, "-m", f"stages.{stage}"], folder)
            point["read_train"] = run([sys.executable, "-c", READ_TRAIN], folder)
            point["bytes"] = {table: disk_usage(folder / f"data/{table}.parquet") for table in TABLES}
            point["tokens"] = json.loads((folder / "metrics/format.json").read_text(encoding="utf-8"))["tokens"]
            point["split"] |= json.loads((folder / "metrics/split.json").read_text(encoding="utf-8"))
            points.append(point)
            print(json.dumps(point), flush=True)
    return points


def one_core() -> dict[str, list[list[float]]]:
    """Seconds of a stage on one core and on all cores, measured alternately."""
    seconds: dict[str, list[list[float]]] = {"format": [], "split": []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_project(folder, CORES_ROWS)
        run([sys.executable, "-m", "stages.download_dataset"], folder)
        for _ in range(REPEATS):
            for stage, pairs in seconds.items():
                command = [sys.executable, "-m", f"stages.{stage}"]
                pairs.append([run([*prefix, *command], folder)["seconds"] for prefix in (["taskset", "1"], [])])
                print(f"{stage}, seconds on one core and on all cores: {pairs[-1]}", flush=True)
    return seconds


def gpt2() -> dict[str, Any]:
    """Measure optimizer steps of GPT-2 (124 million parameters). Random weights take the same time as trained ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    params = load_params(TrainParams)
    precision = "bf16" if uses_bf16("auto", pick_device()) else "fp32"
    examples = long_examples(training.num_steps() * effective_batch_size(params))
    with TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        return training.measure(examples, params, [("this project", precision)], Path(folder))


def run(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a command; returns its seconds, and its peak memory in bytes.

    The peak memory is the largest sum, over the processes that run at the same time, of their peaks so far. The
    anonymous memory is the largest sum that was seen; it does not include pages of files.

    Shared memory is counted in each process. Proportional set sizes would be exact, but reading them slows down the
    processes.
    """
    start, peak, anonymous = time.perf_counter(), 0, 0
    process = psutil.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # a process has ended
            members = [process, *process.children(recursive=True)]
            peak = max(peak, sum(process_memory(member.pid, PEAK) for member in members))
            anonymous = max(anonymous, sum(process_memory(member.pid, ANONYMOUS) for member in members))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exited with {process.returncode}")
    return {
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak,
        "anonymous_memory_bytes": anonymous,
    }


if __name__ == "__main__":
    main()
