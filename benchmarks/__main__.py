"""Run all benchmarks; write `results.json` and `results.png`, on a GPU `results-cuda.*`; print tables in Markdown."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import formatting, training
from benchmarks.data import ALPACA, long_examples
from benchmarks.report import draw, results_file, table
from stages.data.examples import read_split
from stages.data.files import write_json
from stages.engine.models import load_model, pick_device, uses_bf16
from stages.engine.schedule import effective_batch_size
from stages.engine.speed import flops_per_token
from stages.runtime.params import TrainParams, load_params

GPU_BATCH_SIZE = 16  # examples; the default of 4 would measure little but the start of kernels


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"  # the progress bars of several processes would overwrite each other
    params, device = load_params(TrainParams), pick_device()
    runs = [("textbook", "fp32"), ("textbook", "bf16"), ("TRL", "bf16"), ("this project", "bf16")]
    if device.type == "cuda":
        params = params.model_copy(update={"batch_size": GPU_BATCH_SIZE})
        runs = [*runs[1:-1], ("TRL, padding-free", "bf16"), runs[-1]]
    elif not uses_bf16("auto", device):
        print("This processor has no bf16 instructions, and emulation takes minutes per step, so all engines use fp32.")
        runs = [("textbook", "fp32"), ("TRL", "fp32"), ("this project", "fp32")]
    precision = runs[-1][1]
    num_examples = training.num_steps() * effective_batch_size(params)
    results = {
        **machine(),
        "flops_per_token": flops_per_token(load_model(training.BASE)),
        "training": {
            "short": training.measure(read_split(Path("data/train.parquet"))[:num_examples], params, runs),
            "long": training.measure(long_examples(num_examples), params, runs),
            "Alpaca-like": training.measure(long_examples(num_examples, ALPACA), params, runs),
            # Measured separately, because a fifth engine would not fit in memory.
            "LoRA against all weights, Alpaca-like": training.measure(
                long_examples(num_examples, ALPACA), params, [(training.LORA, precision), ("this project", precision)]
            ),
        },
    }
    if device.type == "cpu":
        results["format"] = formatting.measure()
    write_json(results_file(device.type), results)
    draw(results, results_file(device.type).with_suffix(".png"))
    print(table(results))


def machine() -> dict[str, Any]:
    """The date of the measurement, and the machine."""
    names = [f"{os.cpu_count()} cores of {processor()}"]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return {"date": datetime.now(UTC).date().isoformat(), "device": ", ".join(names), "torch": torch.__version__}


def processor() -> str:
    """The name of the processor, with the widest of its instruction sets that matter for speed."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in values.items()}
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in fields["flags"]), "none")
    return f"{fields['model name']} ({widest})"


if __name__ == "__main__":
    main()
