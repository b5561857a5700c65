"""Load a model, and choose its device and precision."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from stages.runtime.errors import UserError, user_errors


def pick_device() -> torch.device:
    """The first available device of CUDA, MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors instead of returning it to the system.

    This saves a seventh of a training step on a CPU. Otherwise the kernel maps and zeroes the pages of each large
    tensor.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def load_model(folder: Path, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal language model with fp32 weights, on `pick_device()` by default."""
    keep_freed_memory()
    device = device or pick_device()
    with user_errors(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, device_map={"": device}
        )
    # A checkpoint's own settings, such as a repetition penalty, would change greedy answers.
    model.generation_config = GenerationConfig()
    return model


def load_on_meta(folder: Path) -> PreTrainedModel:
    """Create a causal language model on the `meta` device, which takes no memory."""
    with user_errors(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def check_context_length(model: PreTrainedModel, num_tokens: int, parameter: str) -> None:
    """Check that a model has positions for `num_tokens` tokens.

    Raises:
        UserError: it has fewer. Learned position embeddings end there; with other kinds, the model was not trained on
            longer inputs.
    """
    limit = context_length(model)
    if num_tokens > limit:
        raise UserError(
            f"{parameter}: found {num_tokens:,} tokens; this model has {limit:,} positions "
            "(max_position_embeddings): use fewer tokens, or another model"
        )


def context_length(model: PreTrainedModel) -> int:
    """The number of positions of a model; the largest integer if its config does not have it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else sys.maxsize


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype of a saved model's weights."""
    dtype = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix multiplications run in bf16; with `auto`, if the processor has bf16 instructions.

    Without these instructions bf16 is emulated; on an AVX2 processor it was 130 times slower than fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def autocast(precision: str, device: torch.device, cache_enabled: bool = True) -> AbstractContextManager[None]:
    """Run the model in bf16 if `uses_bf16`. Its weights and precision-sensitive operations stay in fp32.

    Args:
        cache_enabled: cast each weight once, and keep the bf16 copy until the end of the block. False for sharded
            weights, because copies of all of them would not fit into memory.
    """
    if not uses_bf16(precision, device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache_enabled)


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model computes in fp32, without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        model.train(training)
