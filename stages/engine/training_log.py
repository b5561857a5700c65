"""The log of a training run: progress on the terminal, the training curve, and the totals of the run."""

import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.engine.engine import StepResult
from stages.runtime.files import write_csv

COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm")
STEPS_TO_ESTIMATE = 3  # the remaining time is printed after this many steps


class TrainingLog:
    """Averages of a run, written to a CSV file every `logging_steps` and at each validation.

    Args:
        num_steps: optimizer steps of the whole run.
        curve: the CSV file; None to write nothing.
    """

    def __init__(self, num_steps: int, logging_steps: int, curve: Path | None):
        self._num_steps = num_steps
        self._logging_steps = logging_steps
        self._file = curve
        self._record: dict[str, float | None] = {}
        self._progress = tqdm(total=num_steps, unit="step")
        # "run" and "window": summed loss (nats) and supervised tokens, of the whole run and since the last logged loss.
        self.load_state_dict({"step": 0, "curve": [], "run": [0.0, 0], "window": [0.0, 0]})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step, self._curve, self._run, self._window = (state[key] for key in ("step", "curve", "run", "window"))
        self._progress.initial = self._progress.n = self.step
        self._started, self._first_step = time.monotonic(), self.step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "curve": self._curve, "run": self._run, "window": self._window}

    def log_step(self, result: StepResult) -> None:
        """Count a step and begin its record; every `logging_steps`, add the mean loss since the last time."""
        self.step += 1
        for total in (self._run, self._window):
            total[0] += result.loss_sum
            total[1] += result.num_supervised
        self._record = dict.fromkeys(COLUMNS) | {"step": self.step}
        if self.step % self._logging_steps == 0 or self.step == self._num_steps:
            loss_sum, num_supervised = self._window
            self._window = [0.0, 0]
            loss, rate, norm = loss_sum / num_supervised, result.learning_rate, result.gradient_norm
            self._record |= {"loss": loss, "learning_rate": rate, "gradient_norm": norm}
            speed = result.num_tokens * (self._progress.format_dict["rate"] or 0)
            self._progress.set_postfix_str(f"loss {loss:.3f}, lr {rate:.2e}, {speed:,.0f} tokens/s")
        self._progress.update()
        if self.step == self._first_step + STEPS_TO_ESTIMATE:
            minutes = (time.monotonic() - self._started) / STEPS_TO_ESTIMATE * (self._num_steps - self.step) / 60
            tqdm.write(f"About {math.ceil(minutes):,} min left, not counting validation")

    def log_validation(self, loss: float) -> bool:
        """Record a validation loss; returns whether it is the lowest so far."""
        is_best = loss < min((best for _, best in self.validations()), default=math.inf)
        self._record["validation_loss"] = loss
        return is_best

    def write(self) -> None:
        """Add the record of this step to the curve, unless it has no values."""
        if any(value is not None for name, value in self._record.items() if name != "step"):
            self._curve.append(self._record)
            if self._file:
                write_csv(self._file, ",".join(COLUMNS), [list(record.values()) for record in self._curve])

    def validations(self) -> list[tuple[int, float]]:
        """Step and loss of each validation so far."""
        return [(row["step"], row["validation_loss"]) for row in self._curve if row["validation_loss"] is not None]

    def metrics(self, num_examples: int) -> dict[str, Any]:
        """The metrics of the finished run."""
        self._progress.close()
        loss_sum, num_supervised = self._run
        best_step, best_loss = min(self.validations(), key=lambda validation: validation[1])
        return {
            "steps": self._num_steps,
            "examples": num_examples,
            "supervised_tokens": num_supervised,
            "loss": loss_sum / num_supervised,
            "validation_loss": best_loss,
            "best_step": best_step,
        }
