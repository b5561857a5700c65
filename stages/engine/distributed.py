"""Training in several processes, one per device. Without a launcher there is one process, and nothing is distributed.

Every rank knows the whole effective batch, computes its part, and divides its summed loss by the supervised tokens of
all ranks. So gradients are summed over ranks, and the loss equals that of one process.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import compress
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from stages.engine.models import decoder_layers, pick_device, set_buffer
from stages.runtime.errors import UserError

TIMEOUT = timedelta(hours=2)  # the other ranks wait while the main process writes a large model
T = TypeVar("T")


@dataclass
class DistributedContext:
    """One rank of `world_size`. Rank 0 is the main process, the only one that writes files.

    sharded: True if each rank holds a part of every weight, gradient and moment (FSDP2); False if it holds all of them.
    reshard_after_forward: free a layer's weights between forward and backward (FSDP2).
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    sharded: bool = False
    reshard_after_forward: bool = True

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.world_size} processes, weights " + ("sharded (FSDP2)" if self.sharded else "replicated")

    def broadcast_from_main(self, function: Callable[[], T]) -> T:
        """Call the function in the main process and return its result on all ranks."""
        if self.world_size == 1:
            return function()
        values = [function() if self.is_main_process else None]
        torch.distributed.broadcast_object_list(values)
        return values[0]  # type: ignore[return-value]

    def gather(self, number: float) -> list[float]:
        """Gather a number from every rank, in float64."""
        if self.world_size == 1:
            return [number]
        tensor = torch.tensor([number], dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, tensor)
        return torch.cat(gathered).tolist()

    def num_padding_steps(self, num_calls: int) -> int:
        """How often this rank must also call the model, after `num_calls`, so that all ranks call it equally often.

        Sharded weights need this, because each call gathers them from all ranks.
        """
        return int(max(self.gather(num_calls))) - num_calls if self.sharded else 0

    def all_reduce_gradients(self, model: PreTrainedModel) -> None:
        """Sum the gradients of replicated weights over all ranks; FSDP2 sums those of sharded weights itself.

        A weight that no rank has used keeps no gradient, so that AdamW does not decay it, as with one process.
        """
        if self.world_size == 1 or self.sharded:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        is_used = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.device).byte()
        torch.distributed.all_reduce(is_used, torch.distributed.ReduceOp.MAX)
        pending = []
        for parameter in compress(parameters, is_used.tolist()):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pending.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
        for work in pending:
            work.wait()

    def shutdown(self) -> None:
        if self.world_size > 1:
            torch.distributed.destroy_process_group()

    def shard(self, model: PreTrainedModel) -> None:
        """Shard the main process's model, which is on the CPU, over all ranks. The others have theirs on `meta`."""
        from torch.distributed import broadcast
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.fsdp import FSDPModule, fully_shard

        weights = model.state_dict() if self.is_main_process else {}
        buffers = dict(model.named_buffers(remove_duplicate=False))  # such as rotary frequencies: not in the state dict
        torch.nn.Module.to(model, "meta")
        model.tie_weights()  # moving the weights untied them
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model)
        model.to_empty(device=self.device)
        model.tie_weights()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
        for name, buffer in buffers.items():
            value = buffer.to(self.device) if self.is_main_process else torch.empty_like(buffer, device=self.device)
            broadcast(value, 0)
            set_buffer(model, name, value)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sum the gradients, which FSDP averages by default
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def reshard(self, model: PreTrainedModel) -> None:
        """Free the weights that a forward pass without a backward pass has gathered (FSDP2).

        Otherwise the next step would use them, and they would not be updated.
        """
        if self.sharded:
            for module in model.modules():
                if reshard := getattr(module, "reshard", None):
                    reshard()

    def gather_full_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The full tensors on the main process, gathered one after another; an empty dict on the other ranks."""
        gathered = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor)
            if self.is_main_process:
                gathered[name] = full.cpu() if self.sharded else full
        return gathered

    def random_states(self) -> dict[str, torch.Tensor]:
        """The states of the random number generators of all ranks."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state()
        ranks: list[Any] = [generators] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(ranks, generators)
        return {f"rng.{rank}.{name}": state for rank, states in enumerate(ranks) for name, state in states.items()}

    def load_random_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore this rank's state. A rank keeps its current state if the checkpoint was written by fewer ranks."""
        for name, set_state in {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}.items():
            if (state := tensors.get(f"rng.{self.rank}.{name}")) is not None:
                set_state(state)


def init_distributed() -> DistributedContext:
    """Join the processes that a launcher has started, if there are several.

    Accelerate reads what `torchrun`, `accelerate launch` and Slurm set in the environment: rank, device, backend and
    sharding.

    Raises:
        UserError: the launcher requests another kind of distribution.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return DistributedContext(pick_device())
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    sharded, reshard_after_forward = parse_flag_from_env("ACCELERATE_USE_FSDP"), True
    if sharded:
        if os.environ.get("FSDP_VERSION") != "2" or parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            raise UserError("launcher: found FSDP 1 or offloaded parameters; must be --fsdp_version 2, not offloaded")
        reshard_after_forward = bool(FullyShardedDataParallelPlugin().reshard_after_forward)
    state = PartialState(cpu=pick_device().type != "cuda", timeout=TIMEOUT)
    if state.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(f"launcher: found {state.distributed_type.value}; must start processes on GPUs or on CPUs")
    return DistributedContext(state.device, state.process_index, state.num_processes, sharded, reshard_after_forward)


def run_inference(launcher: str, function: Callable[[DistributedContext], T]) -> T | None:
    """Call the function on the main process, and on all ranks if the weights are sharded.

    Returns:
        Its result on the main process, None on the other ranks.
    """
    context = init_distributed()
    if context.sharded:
        print(f"Launcher: {launcher}: {context}")
    result = function(context) if context.is_main_process or context.sharded else None
    context.shutdown()
    return result if context.is_main_process else None


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one, on every rank; other tensors unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor like another one: this rank's part, or the full tensor if the other is not sharded."""
    # The step count in AdamW's state is a scalar, which is never sharded.
    if not hasattr(like, "full_tensor") or not full.ndim:
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None)
