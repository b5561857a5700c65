"""The log of a training run: progress on the terminal, the training curve, and the totals of the run."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.data.files import write_csv
from stages.engine.engine import StepResult

COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm")
STEPS_TO_ESTIMATE = 3  # the remaining time is printed after this many steps


class TrainingLog:
    """The history of a run, also written as a CSV file: averages over `logging_steps`, and validation losses.

    Args:
        num_steps: optimizer steps of the whole run.
        curve: the CSV file; None to write nothing.
        peak: FLOP/s of a large matrix multiplication on this device (of all ranks).
    """

    def __init__(self, num_steps: int, logging_steps: int, curve: Path | None, peak: float = math.inf):
        self._num_steps = num_steps
        self._peak = peak
        self._logging_steps = logging_steps
        self._file = curve
        self._progress = tqdm(total=num_steps, unit="step")
        self._seconds = self._tokens = self._flops = 0.0  # of the steps of this process
        self.load_state_dict({"steps": [], "validations": []})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        # For each step: summed loss (nats), supervised tokens, learning rate, gradient norm.
        self._steps: list[tuple[float, int, float, float]] = state["steps"]
        self.validations: list[tuple[int, float]] = state["validations"]  # step and loss
        self._progress.initial = self._progress.n = self.step
        self._started, self._first_step = time.monotonic(), self.step

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "validations": self.validations}

    @property
    def step(self) -> int:
        """The number of steps so far."""
        return len(self._steps)

    def log_step(self, result: StepResult) -> None:
        """Add a step to the history, and show the progress."""
        loss_sum, num_supervised, rate = result.loss_sum, result.num_supervised, result.learning_rate
        self._steps.append((loss_sum, num_supervised, rate, result.gradient_norm))
        self._seconds += result.seconds
        self._tokens += result.num_tokens
        self._flops += result.flops
        self._progress.set_postfix_str(f"loss {loss_sum / num_supervised:.3f}, lr {rate:.2e}, {self.speed}")
        self._progress.update()
        if self.step == self._first_step + STEPS_TO_ESTIMATE:
            minutes = (time.monotonic() - self._started) / STEPS_TO_ESTIMATE * (self._num_steps - self.step) / 60
            tqdm.write(f"About {math.ceil(minutes):,} min left, not counting validation")

    @property
    def speed(self) -> str:
        """Tokens per second, without validations and checkpoints, and the share of the device's peak (MFU)."""
        return f"{self._tokens / self._seconds:,.0f} tokens/s, {self._flops / self._seconds / self._peak:.0%} of peak"

    @property
    def validations_since_best(self) -> int:
        """The number of validations after the one with the lowest loss."""
        losses = [loss for _, loss in self.validations]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def end(self) -> None:
        """End the run at this step, before its last one."""
        self._num_steps = self.step
        self.write()

    def log_validation(self, loss: float) -> bool:
        """Record a validation loss; returns whether it is the lowest so far."""
        is_best = loss < min((best for _, best in self.validations), default=math.inf)
        self.validations.append((self.step, loss))
        return is_best

    def write(self) -> None:
        """Write the curve if this step adds a row to it."""
        is_validated = bool(self.validations) and self.validations[-1][0] == self.step
        if self._file and (is_validated or self._is_logged(self.step)):
            write_csv(self._file, ",".join(COLUMNS), self._curve())

    def _is_logged(self, step: int) -> bool:
        return step % self._logging_steps == 0 or step == self._num_steps

    def _curve(self) -> Iterator[Sequence[float | None]]:
        validations = dict(self.validations)
        loss_sum, num_supervised = 0.0, 0  # since the last logged loss
        for step, (loss, supervised, rate, norm) in enumerate(self._steps, 1):
            loss_sum += loss
            num_supervised += supervised
            if self._is_logged(step):
                yield step, loss_sum / num_supervised, validations.get(step), rate, norm
                loss_sum, num_supervised = 0.0, 0
            elif step in validations:
                yield step, None, validations[step], None, None

    def metrics(self, num_examples: int) -> dict[str, Any]:
        """The metrics of the finished run."""
        self._progress.close()
        num_supervised = sum(supervised for _, supervised, *_ in self._steps)
        best_step, best_loss = min(self.validations, key=lambda validation: validation[1])
        return {
            "steps": self.step,
            "examples": num_examples,
            "supervised_tokens": num_supervised,
            "loss": sum(loss for loss, *_ in self._steps) / num_supervised,
            "validation_loss": best_loss,
            "best_step": best_step,
        }
