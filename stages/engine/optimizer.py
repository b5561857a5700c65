"""The optimizer and its learning rate."""

from typing import TYPE_CHECKING, Any

from stages.engine.schedule import Schedule
from stages.runtime.params import TrainParams

if TYPE_CHECKING:
    import torch


def create_optimizer(
    model: "torch.nn.Module", params: TrainParams, schedule: Schedule
) -> tuple["torch.optim.Optimizer", "torch.optim.lr_scheduler.LambdaLR"]:
    """AdamW, and the scheduler of its learning rate."""
    import torch

    optimizer = torch.optim.AdamW(parameter_groups(model, params.weight_decay), params.learning_rate, fused=True)
    # The scheduler counts steps from 0.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule.learning_rate_ratio(done + 1))
    return optimizer, scheduler


def trainable_parameters(model: "torch.nn.Module") -> dict[str, "torch.Tensor"]:
    """Trainable parameters by name; with LoRA, the adapters'."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: "torch.nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: weight decay for matrices, none for biases and norms, which are vectors."""
    parameters = trainable_parameters(model).values()
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
