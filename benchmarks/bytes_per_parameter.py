"""Measure the memory of training by fine-tuning, optimizer and activation checkpointing, on the CPU.

A model with about a billion random parameters is trained for two steps of few tokens, so that activations need little.
Each setting has a process of its own. Writes `benchmarks/memory.json` and prints a table in Markdown.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.__main__ import machine
from benchmarks.memory import PEAK, process_memory
from benchmarks.report import markdown_table
from stages.data.examples import IGNORE_INDEX, Example
from stages.data.files import write_json
from stages.engine.distributed import DistributedContext
from stages.engine.engine import Engine
from stages.engine.models import matrix_layers, uses_bf16
from stages.engine.optimizer import state_bytes, trainable_parameters
from stages.engine.schedule import Schedule
from stages.runtime.params import TrainParams, load_params
from stages.runtime.run import run

RESULTS = Path(__file__).with_name("memory.json")
SETTINGS = {
    "finetuning": ["full", "lora", "qlora"],
    "optimizer": ["adamw", "adamw_8bit", "adamw_bf16"],
    "activation_checkpointing": ["off", "on"],
}
# 1.1 billion parameters with 22 layers, as TinyLlama.
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
NUM_EXAMPLES, LENGTH = 4, 32
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22, help="a smaller model, to try this command")
    sizes = SIZES | {"num_hidden_layers": parser.parse_args().layers}
    results = machine() | measure(sizes, load_params(TrainParams))
    write_json(RESULTS, results)
    print(table(results))


def measure(sizes: dict[str, int], params: TrainParams) -> dict[str, Any]:
    """The number of parameters of a model with these sizes, and the memory of its training with each setting."""
    few_tokens = {"batch_size": NUM_EXAMPLES, "gradient_accumulation_steps": 1, "max_length": LENGTH, "max_steps": 2}
    with TemporaryDirectory() as name:
        num_parameters = in_new_process(write_model, sizes, Path(name))
        runs = []
        for values in product(*SETTINGS.values()):
            setting = dict(zip(SETTINGS, values, strict=True))
            if setting["optimizer"] == "adamw_bf16" and setting["finetuning"] != "full":
                continue  # refused
            changed = params.model_copy(update={**few_tokens, **setting})
            runs.append({**setting, **in_new_process(train, changed, Path(name))})
            print(json.dumps(runs[-1]), flush=True)
    precision = "bf16" if uses_bf16(params.precision, CPU) else "fp32"
    return {"parameters": num_parameters, "tokens": NUM_EXAMPLES * LENGTH, "precision": precision, "runs": runs}


def in_new_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process of its own; a process that had more memory before would hide its peak."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_model(sizes: dict[str, Any], folder: Path) -> int:
    """Save a model with random weights in bf16; returns its number of parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def train(params: TrainParams, folder: Path) -> dict[str, int]:
    """Train for two steps; returns the growth of the peak memory of this process, and what was computed, in bytes."""
    random = np.random.default_rng(0)
    ids = random.integers(3, 400, (2 * NUM_EXAMPLES, LENGTH), np.int32)
    labels = np.where(np.arange(LENGTH) < LENGTH // 2, IGNORE_INDEX, ids)
    examples = [Example(str(number), *rows) for number, rows in enumerate(zip(ids, labels, strict=True))]
    before = process_memory(os.getpid(), PEAK)
    engine = Engine.load(params, examples, Schedule.plan(params, len(examples)), DistributedContext(CPU), folder)
    for batch in engine.prepare([examples[:NUM_EXAMPLES], examples[NUM_EXAMPLES:]]):
        engine.train_step(batch)
    return {"computed": computed_memory(engine), "measured": process_memory(os.getpid(), PEAK) - before}


def computed_memory(engine: Engine) -> int:
    """Bytes of weights, gradients and optimizer state, and of the copy of trained matrices that autocast makes."""
    trained = trainable_parameters(engine.model).values()
    total = sum(weight.nbytes for weight in engine.model.parameters())
    total += sum(weight.nbytes + state_bytes(weight.numel(), engine.params.optimizer) for weight in trained)
    if uses_bf16(engine.params.precision, CPU):
        total += sum(
            2 * weight.numel()
            for layer in matrix_layers(engine.model)
            for weight in layer.parameters(recurse=False)
            if weight.requires_grad and weight.ndim == 2 and weight.dtype == torch.float32
        )
    return total


def table(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and `docs/memory.md`."""
    count = results["parameters"]
    columns = [*(name.replace("_", " ") for name in SETTINGS), "computed (bytes/parameter)", "measured"]
    rows = [
        [*(values[name] for name in SETTINGS), f"{values['computed'] / count:.2f}", f"{values['measured'] / count:.2f}"]
        for values in results["runs"]
    ]
    where = f"{results['date']}, {results['device']}, {results['precision']}"
    return f"{where}. {count:,} parameters, {results['tokens']} tokens/step.\n\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    run(main)
