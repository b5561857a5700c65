"""AdamW with moments in 8 bits (https://arxiv.org/abs/2110.02861), by bitsandbytes; also for weights in bf16."""

from typing import Any

import torch
from bitsandbytes.optim import adamw

from stages.engine.optimizer import BLOCK_SIZE

PART_SIZE = 2**14 * BLOCK_SIZE


class AdamW8bit(adamw.AdamW8bit):
    """Updates large tensors in parts on a CPU, where bitsandbytes needs 32 bytes for each element that it updates.

    The bits are the same, because blocks do not depend on each other.
    """

    def update_step(self, group: dict[str, Any], p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        state, gradient = self.state[p], p.grad
        if p.device.type != "cpu" or p.numel() <= PART_SIZE or gradient is None or not p.is_contiguous():
            super().update_step(group, p, gindex, pindex)  # type: ignore[no-untyped-call]
            return
        gradient = gradient.contiguous().view(-1)
        for start in range(0, p.numel(), PART_SIZE):
            elements = slice(start, start + PART_SIZE)
            blocks = slice(start // BLOCK_SIZE, (start + PART_SIZE) // BLOCK_SIZE)
            part = torch.nn.Parameter(p.data.view(-1)[elements])
            part.grad = gradient[elements]
            moments = {name: state[name].view(-1)[elements] for name in ("state1", "state2")}
            scales = {name: state[name][blocks] for name in ("absmax1", "absmax2")}
            self.state[part] = {**state, **moments, **scales}
            super().update_step(group, part, gindex, pindex)  # type: ignore[no-untyped-call]
            del self.state[part]
        state["step"] += 1


class AdamWBf16(AdamW8bit):
    """Weights and gradients in bf16. An updated weight is rounded up or down at random, so that its mean is exact.

    Rounding to nearest would lose updates below half a unit of the last place (https://arxiv.org/abs/2010.06192).
    """

    def update_step(self, group: dict[str, Any], p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        if p.dtype != torch.bfloat16 or p.grad is None:
            super().update_step(group, p, gindex, pindex)
            return
        exact = torch.nn.Parameter(p.data.float())  # of one tensor at a time
        exact.grad = p.grad.float()
        self.state[exact] = self.state[p]
        super().update_step(group, exact, gindex, pindex)
        del self.state[exact]
        # The seed is a function of step and tensor, so that resumed runs and all ranks draw the same numbers.
        generator = torch.Generator(p.device).manual_seed(self.state[p]["step"] * 2**20 + pindex)
        bits = exact.data.view(torch.int32)
        bits += torch.randint(2**16, bits.shape, dtype=torch.int32, device=p.device, generator=generator)
        bits &= -(2**16)  # the upper half is the bf16 number
        p.data.copy_(exact.data)
