"""Load the base model for training: with adapters, quantized or sharded, as the parameters say."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from stages.engine.distributed import DistributedContext
from stages.engine.models import load_as_stored, load_model, load_on_meta, matrix_ids, round_matrices, uses_bf16
from stages.engine.optimizer import state_bytes
from stages.runtime.errors import UserError
from stages.runtime.memory_limit import memory_limit
from stages.runtime.params import TrainParams
from stages.runtime.terminal import format_bytes

BASE = Path("models/base")


def load_for_training(
    params: TrainParams, context: DistributedContext, base: Path = BASE
) -> tuple[PreTrainedModel, list[str]]:
    """The base model in training mode, and log messages about it.

    Raises:
        UserError: bitsandbytes or weights in bf16 can't be used, or too little memory.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic kernels; read once
    set_seed(params.seed)
    precision = "bf16" if uses_bf16(params.precision, context.device) else "fp32"
    messages = [f"Precision: {precision} on {context.device}"]
    require_bitsandbytes(params, context)
    if params.optimizer == "adamw_bf16" and (params.finetuning, precision) != ("full", "bf16"):
        raise UserError(
            f"optimizer: found 'adamw_bf16' with finetuning: {params.finetuning} and {precision} matrix "
            "multiplications; it needs finetuning: full and precision: bf16; or use adamw or adamw_8bit"
        )
    check_memory(base, context, params.precision, params)
    quantization = nf4(params, context, base) if params.finetuning == "qlora" else None
    if params.optimizer == "adamw_bf16":
        model = load_in_bf16(base, context.device).train()
    else:
        stored = precision if params.finetuning != "full" else "fp32"  # weights that are trained are in fp32
        model = load_weights(base, context, stored, quantization).train()
    if params.finetuning != "full":
        from stages.engine.lora import add_adapters

        messages.append(add_adapters(model, params))
    if context.sharded:
        context.shard(model)
    if context.rank:
        set_seed(params.seed + context.rank)  # equal adapters on all ranks, but different dropout
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        messages.append("The load-balancing loss of the experts is not added, because it depends on micro-batches")
    return model, messages


def load_in_bf16(folder: Path, device: torch.device) -> PreTrainedModel:
    """A model whose matrices and token embedding are in bf16. What the embedding returns is in fp32."""
    model = load_as_stored(folder, device)
    embeddings = model.get_input_embeddings()
    round_matrices(model, embeddings)
    embeddings.register_forward_hook(lambda _module, _inputs, output: output.float())
    return model


def load_for_inference(folder: Path, precision: str, context: DistributedContext) -> PreTrainedModel:
    """A model for evaluation and generation, sharded if the launcher shards weights.

    With sharded weights, all ranks must make the same calls, because each call gathers the weights from all ranks.
    """
    # Not all operations of generation have deterministic kernels, which training in the same process may have enabled.
    torch.use_deterministic_algorithms(False)
    check_memory(folder, context, precision)
    model = load_weights(folder, context, precision)
    if context.sharded:
        context.shard(model)
    model.eval()
    return model


def load_weights(
    folder: Path, context: DistributedContext, precision: str, quantization: Any = None
) -> PreTrainedModel:
    """A model; before it is sharded, it is on the CPU of the main process, and without weights on the other ranks."""
    if not context.sharded:
        return load_model(folder, context.device, precision, quantization)
    return load_model(folder, torch.device("cpu")) if context.is_main_process else load_on_meta(folder)


def check_memory(folder: Path, context: DistributedContext, precision: str, params: TrainParams | None = None) -> None:
    """Check, before a model is loaded, that it does not need more memory than this process may use.

    Sharded weights, and those that are stored quantized, are not checked. Weights that a CPU maps from a file count,
    too, because reading them again for each micro-batch would take hours.

    Args:
        params: those of a training; None: only the weights are needed.

    Raises:
        UserError: it needs more even without activations.
    """
    model = None if context.sharded else load_on_meta(folder)
    if model is None or getattr(model.config, "quantization_config", None):
        return
    on_gpu, in_bf16 = context.device.type == "cuda", uses_bf16(precision, context.device)
    total = torch.cuda.get_device_properties(context.device).total_memory if on_gpu else 0
    limit, source = (total, "this GPU") if on_gpu else memory_limit()
    finetuning, optimizer = (params.finetuning, params.optimizer) if params else ("lora", "adamw")
    needed = needed_memory(model, in_bf16, finetuning, optimizer)
    if needed <= limit:
        return
    others = {
        "optimizer: adamw_8bit": needed_memory(model, in_bf16, finetuning, "adamw_8bit"),
        **({"optimizer: adamw_bf16": needed_memory(model, True, "full", "adamw_bf16")} if in_bf16 else {}),
        "finetuning: lora": needed_memory(model, in_bf16, "lora", optimizer),
        "finetuning: qlora": needed_memory(model, in_bf16, "qlora", optimizer),
    }
    fitting = [f"{name} ({format_bytes(size)})" for name, size in others.items() if params and size <= limit]
    purpose = "weights, gradients and optimizer state" if finetuning == "full" else "weights"
    advice = f"set {', '.join(fitting)}, or " * bool(fitting) + "use a smaller model or more memory"
    raise UserError(
        f"{folder}: its {purpose} need {format_bytes(needed)} of memory, besides activations; {source} has "
        f"{format_bytes(limit)}; {advice}"
    )


def needed_memory(model: PreTrainedModel, in_bf16: bool, finetuning: str, optimizer: str) -> int:
    """Bytes of a model's weights as `load_model` stores them, and of their gradients and optimizer state.

    Not included are activations, adapters, and copies that exist only during a step or while a model is loaded.
    """
    if finetuning == "full":
        in_half = matrix_ids(model, model.get_input_embeddings()) if optimizer == "adamw_bf16" else ()
        return sum(
            (4 if id(weight) in in_half else 8) * weight.numel() + state_bytes(weight.numel(), optimizer)
            for weight in model.parameters()
        )
    matrices = matrix_ids(model)
    bits = 4 if finetuning == "qlora" else 16 if in_bf16 else 32  # of an element of a matrix
    return sum(weight.numel() * (bits if id(weight) in matrices else 32) for weight in model.parameters()) // 8


def require_bitsandbytes(params: TrainParams, context: DistributedContext) -> None:
    """Check that bitsandbytes is installed and has kernels for this device, if the parameters need it.

    Raises:
        UserError: it can't be used, or the weights are sharded.
    """
    optimizers = ((name, "optimizer", "adamw") for name in ("adamw_8bit", "adamw_bf16"))
    for value, parameter, other in (("qlora", "finetuning", "lora"), *optimizers):
        if getattr(params, parameter) != value:
            continue
        if context.sharded:
            raise UserError(
                f"{parameter}: found '{value}' with a launcher that shards the weights (FSDP2); must be {other}, or "
                "use another launcher"
            )
        if find_spec("bitsandbytes") is None:
            raise UserError(
                f"{parameter}: found '{value}', which needs the package bitsandbytes; install it with "
                f"`.venv/bin/pip install -c constraints.txt -e '.[bitsandbytes]'`, or use {other}"
            )
        if context.device.type == "mps" and parameter == "optimizer":
            raise UserError(
                f"{parameter}: found '{value}' on an Apple GPU (MPS), for which bitsandbytes has no such optimizer; "
                f"must be {other}"
            )


def nf4(params: TrainParams, context: DistributedContext, base: Path) -> Any:
    """The quantization of QLoRA (https://arxiv.org/abs/2305.14314): 4-bit NormalFloat, with quantized constants.

    Raises:
        UserError: the model has fused experts.
    """
    from transformers import BitsAndBytesConfig

    from stages.engine.lora import expert_weights

    if any(expert_weights(load_on_meta(base))):
        raise UserError(
            "finetuning: found 'qlora'; must be lora for this model, because bitsandbytes can't quantize its experts, "
            "which are fused into one parameter per layer"
        )

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if uses_bf16(params.precision, context.device) else torch.float32,
    )
