"""The optimizer and its learning rate schedule."""

import math
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams

if TYPE_CHECKING:
    import torch


def count_warmup_steps(warmup_steps: float, num_steps: int) -> int:
    """Optimizer steps of warmup. A value of 1 or more counts steps; below 1 it is a fraction of the run.

    Raises:
        UserError: the warmup is not shorter than the run.
    """
    steps = int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * num_steps)
    if steps and steps >= num_steps:
        raise UserError(
            f"warmup_steps: found {warmup_steps:g}, which is {steps:,} steps of a run of {num_steps:,}; "
            "must be shorter than the run: lower it, or train longer (num_epochs, a smaller effective batch)"
        )
    return steps


def create_optimizer(
    model: "torch.nn.Module", params: TrainParams, num_steps: int
) -> tuple["torch.optim.Optimizer", Any]:
    """AdamW, and the learning rate scheduler of transformers."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW(parameter_groups(model, params.weight_decay), params.learning_rate, fused=True)
    name = "constant_with_warmup" if params.lr_scheduler == "constant" else params.lr_scheduler
    return optimizer, get_scheduler(name, optimizer, count_warmup_steps(params.warmup_steps, num_steps), num_steps)


def trainable_parameters(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    """Trainable parameters by name; with LoRA, the adapters'."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: "torch.nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: weight decay for matrices, none for biases and norms, which are vectors."""
    parameters = trainable_parameters(model).values()
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
