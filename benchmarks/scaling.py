"""How the data stages grow with the rows, and what larger jobs would cost: `python -m benchmarks.scaling`.

Writes `benchmarks/scaling.json`; `docs/scaling.md` shows it (`python -m benchmarks.costs`).
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
import torch

from benchmarks import training
from benchmarks.__main__ import machine
from benchmarks.costs import RESULTS, STAGES, report
from benchmarks.data import long_examples, long_rows
from benchmarks.memory import peak_memory
from stages.shared.files import ROWS_PER_SHARD, write_json
from stages.shared.models import uses_bf16
from stages.shared.params import TrainParams, load_params
from stages.shared.terminal import disk_use

ROWS = [count * ROWS_PER_SHARD for count in (1, 2, 4, 8, 16)]
TABLES = ("raw", "formatted", "train", "validation", "test")
READ_TRAIN = "from pathlib import Path; from stages.shared.examples import *; read_split(Path('data/train.parquet'))"
CORES_ROWS, REPEATS = 2 * ROWS_PER_SHARD, 2


def main() -> None:
    results = {
        **machine(),
        "curve": curve(),
        "one_core": one_core(),
        "training": gpt2(),
    }
    write_json(RESULTS, results)
    print(report(results))


def curve() -> list[dict[str, Any]]:
    """For each number of rows the seconds and the peak memory of each stage, and the bytes of what it wrote."""
    points = []
    for num_rows in ROWS:
        with TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, num_rows)
            point: dict[str, Any] = {"rows": num_rows}
            for stage in STAGES:
                point[stage] = run([sys.executable, "-m", f"stages.{stage}"], folder)
            point["read_train"] = run([sys.executable, "-c", READ_TRAIN], folder)
            point["bytes"] = {table: disk_use(folder / f"data/{table}.parquet") for table in TABLES}
            point["tokens"] = json.loads((folder / "metrics/format.json").read_text())["tokens"]
            point["split"] |= json.loads((folder / "metrics/split.json").read_text())
            points.append(point)
            print(json.dumps(point), flush=True)
    return points


def one_core() -> dict[str, list[list[float]]]:
    """Seconds of a stage on one core and on all, in turns."""
    found: dict[str, list[list[float]]] = {"format": [], "split": []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, CORES_ROWS)
        run([sys.executable, "-m", "stages.download_dataset"], folder)
        for _ in range(REPEATS):
            for stage, times in found.items():
                command = [sys.executable, "-m", f"stages.{stage}"]
                times.append([run([*before, *command], folder)["seconds"] for before in (["taskset", "1"], [])])
                print(f"{stage}, one core and all: {times[-1]}", flush=True)
    return found


def gpt2() -> dict[str, Any]:
    """Steps of a model with the shape of GPT-2 (124 million weights, drawn at random: they take the same time)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    params = load_params(TrainParams)
    precision = "bf16" if uses_bf16("auto", torch.device("cpu")) else "fp32"
    examples = long_examples(training.STEPS * training.effective_batch(params))
    with TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        return training.measure(examples, params, [("this project", precision)], Path(folder))


def prepare(folder: Path, num_rows: int) -> None:
    """Write all that the data stages read."""
    for name in ("params.yaml", "dvc.yaml", "templates"):
        (folder / name).symlink_to(Path(name).absolute())
    (folder / "models").mkdir()
    (folder / "models/tokenizer").symlink_to(Path("models/tokenizer").absolute())
    (folder / "data").mkdir()
    with (folder / "data/instructions.jsonl").open("w", encoding="utf-8") as file:
        for row in long_rows(num_rows):
            question, answer = (message["content"] for message in row["messages"])
            file.write(json.dumps({"instruction": question, "input": row["input"], "output": answer}) + "\n")


def run(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Seconds of a command, and the largest sum of the peaks of processes that it had at once, in bytes.

    What processes share counts in each. Their proportional set sizes would be exact, but to read them slows them down.
    """
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            members = [process, *process.children(recursive=True)]
            peak = max(peak, sum(peak_memory(member.pid) for member in members))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exited with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}


if __name__ == "__main__":
    main()
