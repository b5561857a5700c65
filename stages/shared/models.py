"""Load a model; device and precision."""

import ctypes
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.shared.errors import UserError, reading


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors instead of giving it back: a seventh of a training step on a CPU.

    Otherwise each large tensor is mapped anew and its pages are zeroed at first touch.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def load_model(folder: Path, device: torch.device | None = None) -> PreTrainedModel:
    """A causal language model, its weights fp32 whatever the checkpoint's dtype is; on `pick_device` unless told."""
    keep_freed_memory()
    device = device or pick_device()
    with reading(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, device_map={"": device}
        )
    return model


def load_shape(folder: Path) -> PreTrainedModel:
    """A causal language model without weights: they are on `meta`, which takes no memory."""
    with reading(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def require_context(model: PreTrainedModel, num_tokens: int, parameter: str) -> None:
    """See to it that a model has positions for so many tokens.

    Raises:
        UserError: it has fewer. Learned positions end there; others go on, but the model never saw them.
    """
    limit = context_length(model)
    if num_tokens > limit:
        raise UserError(
            f"{parameter}: found {num_tokens:,} tokens in the longest; this model has {limit:,} positions "
            f"(max_position_embeddings): lower {parameter}, or use another model"
        )


def context_length(model: PreTrainedModel) -> float:
    """Positions that a model has, infinity where its config names none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else math.inf


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a saved model's weights lie on disk."""
    dtype = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix multiplications run in bf16: as told, or with `auto` where the processor has the instructions.

    Without them bf16 is emulated: measured 130 times slower than fp32 on an AVX2 processor.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def autocast(precision: str, device: torch.device, keep: bool = True) -> AbstractContextManager[None]:
    """Run the model in bf16 where `uses_bf16`; its weights, and what is sensitive to precision, stay fp32.

    Args:
        keep: the weights in bf16 until the end of the block, so that they are cast once. False where they are sharded:
            all of them at once would not fit.
    """
    if not uses_bf16(precision, device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=keep)
