"""Model FLOPs, and the rate of the device, for the share of its peak that training reaches (MFU)."""

import time

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.engine.models import uses_bf16

REPEATS = 3


def flops_per_token(model: PreTrainedModel) -> tuple[int, int]:
    """FLOPs of forward and backward per token in the linear layers, and per supervised token in the head.

    These are 6 per weight, or 4 if it is frozen (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361), without
    attention scores, which add 2% for 200 tokens, and without the experts of a mixture.
    """
    head = model.get_output_embeddings()
    flops = {True: 0, False: 0}  # whether it is the head
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # not the weight's size, because a quantized weight is packed
            size = module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            size = module.weight.numel()
        else:
            continue
        flops[module is head] += (6 if module.weight.requires_grad else 4) * size
    return flops[False], flops[True]


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix multiplication, the best of `REPEATS`."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if uses_bf16(precision, device) else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(1 + REPEATS):  # the first one warms up
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the result
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
