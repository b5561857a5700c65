"""Measure optimizer steps of this project, of a textbook loop and of TRL, with the same model and data.

Each engine runs in its own process and waits for a message before each step. So the engines take turns on the same
batch, and noise of the machine affects all of them equally.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.memory import PEAK, process_memory
from stages.data.examples import IGNORE_INDEX, Example
from stages.engine.batches import NO_LIMITS, PackedBatches, shuffled_batches
from stages.engine.models import pick_device
from stages.engine.schedule import effective_batch_size
from stages.engine.speed import matmul_rate
from stages.runtime.params import TrainParams

BASE, TOKENIZER = Path("models/base").absolute(), Path("models/tokenizer").absolute()
LORA = "this project, LoRA"
Wait = Callable[[], None]  # returns when it is the engine's turn


@dataclass(frozen=True)
class Work:
    """The work of every engine: one epoch of the examples, with the parameters of `params.yaml`, in fp32 or bf16.

    The learning rate is constant, because the engines have different schedules.
    """

    examples: Sequence[Example]
    params: TrainParams
    base: Path

    @property
    def batches(self) -> list[list[Example]]:
        """The effective batches, in the same order for all engines."""
        return [*shuffled_batches(self.examples, effective_batch_size(self.params), self.params.seed, epoch=0)]


def num_steps() -> int:
    """Optimizer steps per run; the first one is not timed (`WARM_UP` in report.py)."""
    return 10 if pick_device().type == "cuda" else 5


def textbook(work: Work, wait: Wait) -> list[float]:
    """A plain loop (see `tests/textbook.py`): padded to `max_length`, all logits, AdamW."""
    from transformers import AutoModelForCausalLM

    from tests.textbook import textbook_steps

    model = AutoModelForCausalLM.from_pretrained(work.base, dtype="float32", device_map=pick_device()).train()
    losses = []
    wait()
    for loss in textbook_steps(model, work.batches, work.params, 0, work.params.max_length):
        losses.append(loss)
        wait()
    return losses


def trl(work: Work, wait: Wait, padding_free: bool = False) -> list[float]:
    """`SFTTrainer`, padded to the longest example of a micro-batch, with the fastest settings that were found.

    Activations are not recomputed.

    Args:
        padding_free: concatenate the examples of a micro-batch, for GPUs. FlashAttention and the fused loss of
            liger-kernel are used if they are installed.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    class WaitCallback(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()

        on_train_end = on_step_begin

    params = work.params
    attention = "flash_attention_2" if padding_free and find_spec("flash_attn") else "sdpa"
    rows = [
        {"input_ids": example.input_ids.tolist(), "completion_mask": (example.labels != IGNORE_INDEX).astype(int)}
        for batch in work.batches
        for example in batch
    ]
    with TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            bf16=params.precision == "bf16",
            use_cpu=pick_device().type == "cpu",
            per_device_train_batch_size=params.batch_size,
            gradient_accumulation_steps=params.gradient_accumulation_steps,
            learning_rate=params.learning_rate,
            lr_scheduler_type=params.lr_scheduler,
            weight_decay=params.weight_decay,
            max_grad_norm=params.max_grad_norm,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            max_length=None,  # the examples are truncated
            padding_free=padding_free,
            use_liger_kernel=padding_free and find_spec("liger_kernel") is not None,
            completion_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=params.seed,
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(work.base, dtype="float32", attn_implementation=attention),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
            callbacks=[WaitCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def this_project(work: Work, wait: Wait, **changes: Any) -> list[float]:
    """`fit` of `stages/train.py`, in a temporary folder, with other values of some parameters."""
    from stages.engine.checkpoints import Checkpoints
    from stages.engine.distributed import DistributedContext
    from stages.engine.engine import EffectiveBatch, Engine, StepResult
    from stages.engine.schedule import Schedule
    from stages.engine.training_log import TrainingLog
    from stages.train import fit

    class WaitingEngine(Engine):
        """Waits before each step and before the validation at the end."""

        def train_step(self, batch: EffectiveBatch) -> StepResult:
            wait()
            return super().train_step(batch)

        def validation_loss(self, examples: Sequence[Example]) -> float:
            wait()
            return super().validation_loss(examples)

    params, context = work.params.model_copy(update=changes), DistributedContext(pick_device())
    schedule = Schedule.plan(params, len(work.examples))
    engine = WaitingEngine.load(params, work.examples, schedule, context, work.base)
    with TemporaryDirectory() as folder, chdir(folder):
        log = TrainingLog(schedule.num_steps, params.logging_steps, Path("curve.csv"))
        fit(engine, work.examples, work.examples[:1], Checkpoints(Path("checkpoints")), log)
        return [float(line.split(",")[1]) for line in Path("curve.csv").read_text().splitlines()[1:]]


ENGINES: dict[str, Callable[[Work, Wait], list[float]]] = {
    "textbook": textbook,
    "TRL": trl,
    "TRL, padding-free": partial(trl, padding_free=True),
    LORA: partial(this_project, finetuning="lora"),
    "this project": this_project,
}


def run_engine(engine: str, work: Work, connection: Connection) -> None:
    """Run an engine in this process, one step per message; finally send its losses and its peak memory in bytes."""

    def wait() -> None:
        connection.send("ready")
        connection.recv()

    losses = ENGINES[engine](work, wait)
    on_gpu = pick_device().type == "cuda"
    connection.send((losses, torch.cuda.max_memory_allocated() if on_gpu else process_memory(os.getpid(), PEAK)))


@contextmanager
def start_engine(engine: str, work: Work) -> Iterator[Connection]:
    """Start an engine in a new process; yields the connection to it when the engine waits for its first step."""
    context = multiprocessing.get_context("spawn")
    connection, engine_end = context.Pipe()
    process = context.Process(target=run_engine, args=(engine, work, engine_end), daemon=True)
    process.start()
    engine_end.close()  # so that the connection closes when the process ends
    try:
        connection.recv()
        yield connection
        process.join()
    except (EOFError, OSError):
        process.join(timeout=1)
        if process.exitcode:
            raise SystemExit(
                f"{engine}: its process exited with {process.exitcode}; -9 means that memory ran out: free some, and "
                "run again"
            ) from None
        raise


def measure(
    examples: Sequence[Example], params: TrainParams, runs: Sequence[tuple[str, str]], base: Path = BASE
) -> dict[str, Any]:
    """Losses, seconds per step and peak memory of each run.

    Args:
        examples: one optimizer step for each effective batch of them; the first one is not timed.
        runs: engines with their precisions; the others are compared with the last one.
    """
    steps = math.ceil(len(examples) / effective_batch_size(params))
    common = {"num_epochs": 1, "max_steps": None, "lr_scheduler": "constant", "warmup_steps": 0}
    common |= {"eval_steps": steps, "save_steps": steps, "early_stopping_patience": None}
    results: dict[str, Any] = {"real_tokens": [], "distinct_tokens": [], "supervised_tokens": [], "matmul_flops": []}
    results["engines"] = {f"{engine}, {precision}": {"seconds": []} for engine, precision in runs}
    connections = {}
    with ExitStack() as stack:
        for name, (engine, precision) in zip(results["engines"], runs, strict=True):
            work = Work(examples, params.model_copy(update={**common, "precision": precision}), base)
            connections[name] = stack.enter_context(start_engine(engine, work))
        for step, batch in enumerate(work.batches, 1):
            micro_batches = PackedBatches(NO_LIMITS).micro_batches(batch)  # without padding and repeated prefixes
            results["real_tokens"].append(sum(len(example.input_ids) for example in batch))
            results["distinct_tokens"].append(sum(part.inputs["input_ids"].numel() for part in micro_batches))
            results["supervised_tokens"].append(sum(example.num_supervised for example in batch))
            results["matmul_flops"].append(matmul_rate(pick_device(), runs[-1][1]))
            for name, connection in connections.items():
                start = time.perf_counter()
                connection.send("go")
                connection.recv()
                results["engines"][name]["seconds"].append(time.perf_counter() - start)
            times = ", ".join(f"{result['seconds'][-1]:.3g} s" for result in results["engines"].values())
            print(f"step {step} of {steps}: {times}", flush=True)
        for connection in connections.values():
            connection.send("go")
        for name, connection in connections.items():
            losses, memory = connection.recv()
            results["engines"][name] |= {"losses": losses, "peak_memory_bytes": memory}
    return results
