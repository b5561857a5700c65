"""The optimizer, its learning rate, and its state."""

from typing import Any

import torch

from stages.engine.distributed import shard_like
from stages.engine.schedule import Schedule
from stages.runtime.params import TrainParams

# bitsandbytes keeps the moments of smaller tensors in fp32, and those of larger ones in blocks with a common scale.
MIN_8BIT_SIZE, BLOCK_SIZE = 4096, 256


def create_optimizer(
    model: torch.nn.Module, params: TrainParams, schedule: Schedule
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, with moments in fp32 or 8 bits, and the scheduler of its learning rate."""
    groups = parameter_groups(model, params.weight_decay)
    optimizer: torch.optim.Optimizer
    if params.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, params.learning_rate, fused=True)
    else:
        from stages.engine.adamw_8bit import AdamW8bit, AdamWBf16

        kind = AdamW8bit if params.optimizer == "adamw_8bit" else AdamWBf16
        optimizer = kind(groups, params.learning_rate)  # type: ignore[no-untyped-call]
    # The scheduler counts steps from 0.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule.learning_rate_ratio(done + 1))
    return optimizer, scheduler


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters by name; with LoRA, the adapters'."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: weight decay for matrices, none for biases and norms, which are vectors."""
    parameters = trainable_parameters(model).values()
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def state_bytes(num_elements: int, optimizer: str) -> int:
    """Bytes of the two moments of a parameter tensor."""
    if optimizer == "adamw" or num_elements < MIN_8BIT_SIZE:
        return 8 * num_elements
    return 2 * num_elements + 8 * -(-num_elements // BLOCK_SIZE)


def optimizer_state(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors, with names such as `optimizer.0.exp_avg` for the first parameter, and parameter groups."""
    # Not its own method: that of bitsandbytes hides tensors in another dict, for FSDP.
    state = torch.optim.Optimizer.state_dict(optimizer)
    tensors = {
        # bitsandbytes counts steps with an int, and all parameters share its code tables, which safetensors refuses.
        f"optimizer.{index}.{name}": value.clone() if name.startswith("qmap") else torch.as_tensor(value)
        for index, entry in state["state"].items()
        for name, value in entry.items()
    }
    return tensors, state["param_groups"]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], param_groups: list[dict[str, Any]]
) -> None:
    """Restore what `optimizer_state` returned. Other tensors are ignored."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            entries.setdefault(int(index), {})[key] = shard_like(tensor, parameters[int(index)])
    if not isinstance(optimizer, torch.optim.AdamW):
        for entry in entries.values():
            entry["step"] = int(entry["step"])
    optimizer.load_state_dict({"state": entries, "param_groups": param_groups})
