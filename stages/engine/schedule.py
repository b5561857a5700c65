"""When a run validates, saves and ends, and its learning rate at each optimizer step."""

import math
from dataclasses import dataclass

from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams


def effective_batch_size(params: TrainParams) -> int:
    """Examples per optimizer step."""
    return params.batch_size * params.gradient_accumulation_steps


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run, counted from 1.

    steps_per_epoch: the last effective batch of an epoch may be smaller.
    warmup_steps: steps until the peak learning rate.
    eval_steps, save_steps: steps between validations and between checkpoints.
    decay: linear, cosine or constant, after warmup.
    min_ratio: the lowest learning rate ÷ the peak, approached at the end of the run.
    """

    num_steps: int
    steps_per_epoch: int
    warmup_steps: int
    eval_steps: int
    save_steps: int
    decay: str
    min_ratio: float

    @classmethod
    def plan(cls, params: TrainParams, num_examples: int) -> "Schedule":
        """The schedule for a training split of `num_examples`.

        Raises:
            UserError: the warmup is not shorter than the run, or training could never stop early.
        """
        steps_per_epoch = math.ceil(num_examples / effective_batch_size(params))
        num_steps = params.num_epochs * steps_per_epoch
        if params.max_steps:
            num_steps = min(num_steps, params.max_steps)
        warmup = count_steps(params.warmup_steps, num_steps)
        if warmup and warmup >= num_steps:
            raise UserError(
                f"warmup_steps: found {params.warmup_steps:g}, which is {warmup:,} steps of a run of {num_steps:,}; "
                "must be shorter than the run: lower it, or train longer (num_epochs, max_steps, a smaller effective "
                "batch)"
            )
        schedule = cls(
            num_steps,
            steps_per_epoch,
            warmup,
            max(1, count_steps(params.eval_steps, num_steps)),
            max(1, count_steps(params.save_steps, num_steps)),
            params.lr_scheduler,
            params.min_learning_rate_ratio,
        )
        num_validations = sum(map(schedule.validates_after, range(1, num_steps)))
        # The first validation is the best so far, so stopping early needs one more than the patience.
        if params.early_stopping_patience and num_validations <= params.early_stopping_patience:
            raise UserError(
                f"early_stopping_patience: found {params.early_stopping_patience}; this run has {num_validations:,} "
                "validations before its last step, so it could never stop early; must be lower, or null, or lower "
                f"eval_steps ({params.eval_steps:g})"
            )
        return schedule

    def learning_rate_ratio(self, step: int) -> float:
        """The learning rate of a step ÷ its peak. It is never 0: warmup ends at the peak, and decay after the run."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        start = max(self.warmup_steps, 1)
        progress = (step - start) / (self.num_steps + 1 - start)
        decayed = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.min_ratio + (1 - self.min_ratio) * decayed[self.decay]

    def validates_after(self, step: int) -> bool:
        """Whether the model is validated after a step.

        The last step always is; a validation shortly before it would cost time and show nothing new.
        """
        is_regular = step % self.eval_steps == 0 and self.num_steps - step >= self.eval_steps / 2
        return is_regular or step == self.num_steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is saved after a step; not after the last one, because the run then ends."""
        return step % self.save_steps == 0 and step < self.num_steps


def count_steps(value: float, num_steps: int) -> int:
    """A number of steps: a value of 1 or more counts them, below 1 it is a fraction of the run."""
    return int(value) if value >= 1 else math.ceil(value * num_steps)
