"""Load a model, and choose its device and precision."""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.runtime.errors import UserError, user_errors

SHARD_SIZE = "1GB"  # of a file with weights; saving can take as much memory


def pick_device() -> torch.device:
    """The first available device of CUDA, MPS and CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors instead of returning it to the system.

    This saves a seventh of a training step on a CPU. Otherwise the kernel maps and zeroes the pages of each large
    tensor. On the other hand, oneDNN would keep the code and the buffers of 1,024 matrix multiplications, one for each
    shape, and packed batches have many shapes. A step needs about 100.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def release_freed_memory() -> None:
    """Return the memory of freed tensors to the system, which `keep_freed_memory` prevents."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def load_model(
    folder: Path, device: torch.device | None = None, precision: str = "fp32", quantization: Any = None
) -> PreTrainedModel:
    """Load a causal language model, with fp32 weights by default.

    Args:
        device: `pick_device()` by default.
        precision: that of matrix multiplications. With bf16, matrices that are not trained are stored as autocast would
            cast them: the same bits, in half the memory.
        quantization: a quantization config of transformers.
    """
    device = device or pick_device()
    in_bf16 = uses_bf16(precision, device)
    # A checkpoint in 16 bits is loaded without an intermediate fp32 copy; other checkpoints must not be rounded.
    model = _load(folder, device, stored_dtype(folder) if in_bf16 else torch.float32, quantization)
    if in_bf16:
        round_matrices(model)
    for layer in matrix_layers(model) if quantization else ():
        # The CPU kernel for inference would replace the weights by a packed form, which rounds their scales.
        setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010 (nn.Module types attributes as tensors)
    return model


def round_matrices(model: PreTrainedModel, *others: torch.nn.Module) -> None:
    """Store the matrices, and the weights of other layers, in bf16, and all else in fp32."""
    matrices = matrix_ids(model, *others)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16 if id(parameter) in matrices else torch.float32)


def load_as_stored(folder: Path, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal language model in the dtype of its checkpoint, to compute within `probing`.

    On a CPU, weights in 16 bits are memory-mapped: they take no memory until they are changed.
    """
    return _load(folder, device or pick_device(), stored_dtype(folder))


def _load(folder: Path, device: torch.device, dtype: torch.dtype, quantization: Any = None) -> PreTrainedModel:
    keep_freed_memory()
    with user_errors(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            device_map={"": device},
            quantization_config=quantization,
        )
    if dtype != torch.float32:
        widen_buffers(model)
    # A checkpoint's own settings, such as a repetition penalty, would change greedy answers.
    model.generation_config = GenerationConfig()
    return model


class _EmptyOnMeta(TorchFunctionMode):
    """Inside the block `torch.empty` takes no memory. `init_empty_weights` allocates each weight before it drops it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}))


def widen_buffers(model: PreTrainedModel) -> None:
    """Replace buffers that are not in the checkpoint, which transformers has computed in bf16."""
    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        exact = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if buffer.is_floating_point():
            value = buffer.float() if name in persistent else exact.get_buffer(name)
            set_buffer(model, name, value.to(buffer.device))


def set_buffer(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the buffer with this name, such as `model.rotary_emb.inv_freq`."""
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, value)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder layers, which transformers never splits over devices."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def matrix_layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The layers that multiply with a matrix, except a head whose matrix is also the token embedding."""
    embeddings = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module.weight is not getattr(embeddings, "weight", None):
            yield module


def matrix_ids(model: PreTrainedModel, *others: torch.nn.Module) -> set[int]:
    """The `id` of each parameter of the layers with a matrix, and of other layers."""
    layers = (*matrix_layers(model), *others)
    return {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model in shards."""
    # Saving undoes the conversions of loading, such as fused experts, for all weights at once, which copies them. With
    # a device map that names the CPU, transformers does so for one shard at a time, but then it can't join tensors that
    # loading has split.
    targets = [conversion.target_patterns for conversion in getattr(model, "_weight_conversions", None) or ()]
    if targets and all(len(names) == 1 and "*" not in names[0] for names in targets):
        setattr(model, "hf_device_map", {"": "cpu"})  # noqa: B010 (nn.Module types attributes as tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


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


def stored_dtype(folder: Path) -> torch.dtype:
    """bf16 or fp16 if a saved model can be loaded in this dtype without rounding, whatever its config says; or fp32."""
    dtypes: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    in_fp32 = [name for name, dtype in dtypes.items() if dtype == "F32"]
    others = "".join({dtype for dtype in dtypes.values() if "F" in dtype} - {"F32"})  # a code, unless there are several
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(others, torch.float32)
    # Some classes of transformers always load certain tensors in fp32.
    kept = load_on_meta(folder)._get_dtype_plan(dtype) if in_fp32 else ()
    return dtype if all(any(key in name for key in kept) for name in in_fp32) else torch.float32


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix multiplications run in bf16; with `auto`, if the processor has bf16 instructions.

    Without these instructions bf16 is emulated; on an AVX2 processor it was 130 times slower than fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def autocast(precision: str, device: torch.device, cache_enabled: bool = True) -> AbstractContextManager[None]:
    """Run the model in bf16 if `uses_bf16`. Precision-sensitive operations, and weights that are trained, stay in fp32.

    Args:
        cache_enabled: cast each weight once, and keep the bf16 copy until the end of the block. False for sharded
            weights, because copies of all of them would not fit into memory.
    """
    if not uses_bf16(precision, device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache_enabled)


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model computes without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model computes in fp32, without dropout and gradients.

    One decoder layer at a time is converted, so that the whole model never takes the memory of fp32.
    """
    stored: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def widen(module: torch.nn.Module, _: Any = None, recurse: bool = True) -> None:
        half = (torch.bfloat16, torch.float16)
        stored[module] = [(item, item.data) for item in module.parameters(recurse) if item.dtype in half]
        for parameter, data in stored[module]:
            parameter.data = data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter, data in stored.pop(module, ()):
            parameter.data = data

    with inference(model), torch.autocast(model.device.type, enabled=False), ExitStack() as undo:
        layers = decoder_layers(model)
        # The modules of a layer together, because it can read their matrices without calling them.
        inside = {module for layer in layers for module in layer.modules()}
        for module in model.modules():
            if module not in inside:  # such as the head, whose dtype some models read before they call it
                widen(module, recurse=False)
                undo.callback(restore, module)
        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(widen).remove)
            undo.callback(layer.register_forward_hook(restore, always_call=True).remove)
        for layer in matrix_layers(model):
            if hasattr(layer, "compute_dtype"):  # a quantized layer
                undo.callback(setattr, layer, "compute_dtype", layer.compute_dtype)
                setattr(layer, "compute_dtype", torch.float32)  # noqa: B010 (nn.Module types attributes as tensors)
        yield
