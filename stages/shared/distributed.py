"""Training in several processes, each on a device of its own. Started without a launcher there is one, and all of this
comes to nothing.

Every process knows the whole effective batch, takes its share of it, and divides its summed loss by the supervised
tokens of all. So gradients are summed over the processes, and the loss is that of one process.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from stages.shared.batches import Batches, MicroBatch, deal
from stages.shared.errors import UserError
from stages.shared.examples import Example
from stages.shared.models import pick_device

TIMEOUT = timedelta(hours=2)  # for a process that waits for the others, and the first may be writing a large model
T = TypeVar("T")


@dataclass
class Processes:
    """This process among `count`, which follow each other from `rank` 0, which alone writes files.

    sharded: each holds a part of every weight, gradient and moment (FSDP2); False: each holds all of them.
    reshard: a layer's weights are freed between forward and backward (FSDP2's reshard_after_forward).
    tokens: computed by this process since the last step. busiest and mean: of all processes, summed over the steps.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    sharded: bool = False
    reshard: bool = True
    tokens: int = 0
    busiest: float = 0.0
    mean: float = 0.0
    gradients: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.count} processes, " + ("weights sharded (FSDP2)" if self.sharded else "weights replicated")

    def first(self, function: Callable[[], T]) -> T:
        """What the function returns in the first process, for all."""
        if self.count == 1:
            return function()
        values = [function() if self.is_first else None]
        torch.distributed.broadcast_object_list(values)
        return values[0]  # type: ignore[return-value]

    def gather(self, *numbers: float) -> list[list[float]]:
        """The numbers of each process, in float64."""
        if self.count == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        all_of_them = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(all_of_them, own)
        return [row.tolist() for row in all_of_them]

    def cut(self, batches: Batches, examples: Sequence[Example]) -> Iterator[tuple[MicroBatch, bool]]:
        """The micro-batches of this process's share, each with whether it counts.

        Sharded processes must call the model equally often: whoever is done goes on with what does not count.
        """
        share = deal(batches.costs(examples), self.count)[self.rank] if self.count > 1 else range(len(examples))
        micro_batches = batches.cut([examples[i] for i in share])
        while True:
            micro_batch = next(micro_batches, None)
            goes_on = micro_batch is not None
            if not (any(more for (more,) in self.gather(goes_on)) if self.sharded else goes_on):
                return
            if micro_batch is None:
                yield next(batches.cut(examples[:1])), False
            else:
                self.tokens += micro_batch.inputs["input_ids"].numel()
                yield micro_batch, True

    def sum_loss(self, loss: float) -> float:
        """Over all processes; here the steps' work is counted, too."""
        rows = self.gather(loss, self.tokens)
        self.tokens = 0
        self.busiest += max(tokens for _, tokens in rows)
        self.mean += sum(tokens for _, tokens in rows) / self.count
        return sum(loss for loss, _ in rows)

    def join_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Let the gradients of replicated weights lie in one tensor, so that one all-reduce sums them.

        That is what DDP does where gradients accumulate first. Its hooks can't be used: they expect one backward a step
        through each weight, and here the head has one for each chunk of logits. Nothing is copied.
        """
        if self.count > 1 and not self.sharded:
            self.gradients = [torch.zeros(sum(p.numel() for p in parameters), device=self.device)]
            start = 0
            for parameter in parameters:
                parameter.grad = self.gradients[0][start : start + parameter.numel()].view(parameter.shape)
                start += parameter.numel()

    def sum_gradients(self) -> None:
        for gradient in self.gradients:
            torch.distributed.all_reduce(gradient)

    def end(self) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()

    def shard(self, model: PreTrainedModel) -> None:
        """Spread the first process's model, in the processor's memory, over all. The others have theirs on `meta`."""
        from torch.distributed import broadcast
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.fsdp import FSDPModule, fully_shard

        weights = model.state_dict() if self.is_first else {}
        buffers = dict(model.named_buffers(remove_duplicate=False))  # rotary frequencies, say: not in the state
        torch.nn.Module.to(model, "meta")
        model.tie_weights()  # moving them has torn them apart
        for module in list(model.modules()):
            if type(module).__name__ in (model._no_split_modules or ()):  # the decoder layers
                fully_shard(module, reshard_after_forward=self.reshard)
        fully_shard(model)
        model.to_empty(device=self.device)
        model.tie_weights()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
        for name, buffer in buffers.items():
            value = buffer.to(self.device) if self.is_first else torch.empty_like(buffer, device=self.device)
            broadcast(value, 0)
            path, _, key = name.rpartition(".")
            setattr(model.get_submodule(path), key, value)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sum, where FSDP averages
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors as one process would have them, for the first; the others get none. One is joined after the other."""
        found = {}
        for name, tensor in tensors.items():
            joined = join(tensor)
            if self.is_first:
                found[name] = joined.cpu() if self.sharded else joined
        return found

    def random_states(self) -> dict[str, torch.Tensor]:
        """The states of the random number generators of all processes."""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state()
        states: list[Any] = [own] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(states, own)
        return {f"rng.{rank}.{name}": state for rank, one in enumerate(states) for name, state in one.items()}

    def restore_random_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        torch.set_rng_state(tensors[f"rng.{self.rank}.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"rng.{self.rank}.cuda"])


def start() -> Processes:
    """Join the processes that a launcher has started, if one has.

    Accelerate reads from the environment what `torchrun`, `accelerate launch` and Slurm put there: who is who, the
    device, the backend, and whether to shard.

    Raises:
        UserError: the launcher asks for another way to distribute than these two.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(pick_device())
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    sharded, reshard = parse_flag_from_env("ACCELERATE_USE_FSDP"), True
    if sharded:
        if os.environ.get("FSDP_VERSION") != "2" or parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            raise UserError(
                "launcher: found FSDP 1 or parameters offloaded; must be --fsdp_version 2, without offloading"
            )
        reshard = bool(FullyShardedDataParallelPlugin().reshard_after_forward)
    state = PartialState(cpu=pick_device().type != "cuda", timeout=TIMEOUT)
    if state.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"launcher: found {state.distributed_type.value}; must start processes on GPUs or on processors"
        )
    return Processes(state.device, state.process_index, state.num_processes, sharded, reshard)


def join(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, in every process; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that is sharded like another; the whole where that is not sharded."""
    if not hasattr(like, "full_tensor") or not whole.ndim:
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
