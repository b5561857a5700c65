"""Optimizer steps of this project, of a textbook loop and of TRL: the same model and data, side by side, interleaved.

Each engine lives in a process of its own and does one step when told to, so that all of them meet the same noise of
the machine and the same batch, one after the other.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.memory import peak_memory
from stages.shared.batches import FlatBatches, shuffle
from stages.shared.examples import NOT_SUPERVISED, Example
from stages.shared.params import TrainParams
from stages.train import effective_batch

BASE, TOKENIZER = Path("models/base").absolute(), Path("models/tokenizer").absolute()
LORA = "this project, LoRA"
STEPS = 5  # the first warms up: its loss counts, its time does not
Gate = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """What every engine does: one pass over the examples, with the parameters of `params.yaml`, in fp32 or bf16."""

    examples: list[Example]
    params: TrainParams
    base: Path
    num_warmup_steps: int = 2

    @property
    def batches(self) -> list[list[Example]]:
        """The effective batches in the order of all engines."""
        return shuffle(self.examples, effective_batch(self.params), self.params.seed, epoch=0)


def textbook(work: Work, gate: Gate) -> list[float]:
    """Padded to `max_length`, all logits, plain AdamW (see `tests/textbook.py`)."""
    from transformers import AutoModelForCausalLM

    from tests.textbook import textbook_steps

    model = AutoModelForCausalLM.from_pretrained(work.base, dtype="float32").train()
    losses = []
    gate()
    for loss in textbook_steps(model, work.batches, work.params, work.num_warmup_steps, work.params.max_length):
        losses.append(loss)
        gate()
    return losses


def trl(work: Work, gate: Gate) -> list[float]:
    """`SFTTrainer`, padded to the longest of a micro-batch. Its settings are the fastest of those tried on a CPU.

    Activations are not recomputed. Packing and padding-free batches, which would save more, need an attention kernel
    that runs on GPUs only.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Gated(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            gate()

    params = work.params
    rows = [
        {"input_ids": example.input_ids.tolist(), "completion_mask": (example.labels != NOT_SUPERVISED).astype(int)}
        for batch in work.batches
        for example in batch
    ]
    with TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            bf16=params.precision == "bf16",
            use_cpu=True,
            per_device_train_batch_size=params.batch_size,
            gradient_accumulation_steps=params.gradient_accumulation_steps,
            learning_rate=params.learning_rate,
            lr_scheduler_type=params.lr_scheduler,
            warmup_steps=work.num_warmup_steps,
            weight_decay=params.weight_decay,
            max_grad_norm=params.max_grad_norm,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            max_length=params.max_length,
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=params.seed,
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(work.base, dtype="float32"),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
            callbacks=[Gated()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class GatedBatches:
    """Batches that wait at the gate before each step."""

    def __init__(self, batches: Any, gate: Gate):
        self._batches = batches
        self._gate = gate

    def cut(self, examples: Sequence[Example]) -> Iterator[Any]:
        self._gate()
        return self._batches.cut(examples)


def this_project(work: Work, gate: Gate) -> list[float]:
    """`fit` of `stages/train.py`, its files in a temporary folder."""
    from stages.shared.checkpoints import Checkpoints
    from stages.shared.distributed import Processes
    from stages.shared.models import pick_device
    from stages.train import CURVE, fit, prepare

    params, examples = work.params, work.examples
    processes = Processes(pick_device())
    model, chosen, _ = prepare(params, examples, processes, work.base)
    batches: Any = GatedBatches(chosen, gate)
    with TemporaryDirectory() as folder, chdir(folder):
        # The validation at the end of the run, on one example, is the last gate.
        checkpoints = Checkpoints(Path("checkpoints"))
        num_steps = len(work.batches)
        fit(model, batches, examples, examples[:1], params, num_steps, work.num_warmup_steps, checkpoints, processes)
        return [float(line.split(",")[1]) for line in CURVE.read_text().splitlines()[1:]]


def with_lora(work: Work, gate: Gate) -> list[float]:
    """This project with `finetuning: lora`."""
    return this_project(replace(work, params=work.params.model_copy(update={"finetuning": "lora"})), gate)


ENGINES = {"textbook": textbook, "TRL": trl, LORA: with_lora, "this project": this_project}


def serve(engine: str, work: Work, connection: Connection) -> None:
    """Run an engine in this process: wait for word before each step, at the end send losses and peak memory (bytes)."""

    def gate() -> None:
        connection.send("ready")
        connection.recv()

    losses = ENGINES[engine](work, gate)
    connection.send((losses, peak_memory(os.getpid())))


@contextmanager
def started(engine: str, work: Work) -> Iterator[Connection]:
    """The connection to an engine that is loaded and waits for its first step."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(engine, work, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process ends the connection, too
    try:
        here.recv()
        yield here
        process.join()
    except (EOFError, OSError):
        process.join(timeout=1)
        if process.exitcode:
            raise SystemExit(f"{engine}: its process ended with {process.exitcode}; -9 is a lack of memory") from None
        raise


def measure(
    examples: list[Example], params: TrainParams, runs: Sequence[tuple[str, str]], base: Path = BASE
) -> dict[str, Any]:
    """Losses, seconds a step and peak memory of each run, which is an engine and its precision."""
    examples = examples[: STEPS * effective_batch(params)]
    works = [Work(examples, params.model_copy(update={"precision": precision}), base) for _, precision in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    peaks: list[float] = []
    with ExitStack() as stack:
        engines = [stack.enter_context(started(engine, work)) for (engine, _), work in zip(runs, works, strict=True)]
        for step in range(STEPS):
            peaks.append(matmul_rate(runs[-1][1]))
            for engine, taken in zip(engines, seconds, strict=True):
                start = time.perf_counter()
                engine.send("go")
                engine.recv()
                taken.append(time.perf_counter() - start)
            print(f"step {step + 1} of {STEPS}: " + ", ".join(f"{taken[-1]:.1f} s" for taken in seconds), flush=True)
        for engine in engines:
            engine.send("go")
        ends = [engine.recv() for engine in engines]
    batches = works[0].batches
    return {
        "real_tokens": [sum(len(example.input_ids) for example in batch) for batch in batches],
        # Each token once: no padding, and what the examples of a step begin with not again.
        "distinct_tokens": [
            sum(micro_batch.inputs["input_ids"].numel() for micro_batch in FlatBatches(2**31).cut(batch))
            for batch in batches
        ],
        "supervised_tokens": [sum(example.num_supervised for example in batch) for batch in batches],
        "matmul_flops": peaks,
        "engines": {
            f"{engine}, {precision}": {"seconds": taken, "losses": losses, "peak_memory_bytes": memory}
            for (engine, precision), taken, (losses, memory) in zip(runs, seconds, ends, strict=True)
        },
    }


def matmul_rate(precision: str, size: int = 2048) -> float:
    """The best rate of a large matrix multiplication, FLOP/s: what the machine can do at this moment."""
    import torch

    a, b = torch.randn(2, size, size).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def flops_per_token() -> tuple[int, int]:
    """Forward and backward: for a token in the body, and for a supervised one in the head (Kaplan et al., 2020, 6 N).

    Attention scores are left out; at these lengths they are 2 % more.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    head = model.get_output_embeddings().weight.numel()
    body = sum(parameter.numel() for name, parameter in model.base_model.named_parameters() if "embed" not in name)
    return 6 * body, 6 * head
