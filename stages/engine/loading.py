"""Load the base model for training: with adapters, quantized or sharded, as the parameters say."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from stages.engine.distributed import DistributedContext
from stages.engine.models import load_model, load_on_meta, uses_bf16
from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams

BASE = Path("models/base")


def load_for_training(
    params: TrainParams, context: DistributedContext, base: Path = BASE
) -> tuple[PreTrainedModel, list[str]]:
    """The base model in training mode, and log messages about it.

    Raises:
        UserError: the model can't be quantized, or not in this way.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic kernels; read once
    set_seed(params.seed)
    precision = "bf16" if uses_bf16(params.precision, context.device) else "fp32"
    messages = [f"Precision: {precision} on {context.device}"]
    quantization = nf4(params, context, base) if params.finetuning == "qlora" else None
    if not context.sharded:
        stored = precision if params.uses_lora else "fp32"  # weights that are trained are in fp32
        model = load_model(base, context.device, stored, quantization).train()
    else:
        model = load_to_shard(base, context).train()
    if params.uses_lora:
        from stages.engine.lora import add_adapters

        messages.append(add_adapters(model, params))
    if context.sharded:
        context.shard(model)
    if context.rank:
        set_seed(params.seed + context.rank)  # equal adapters on all ranks, but different dropout
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        messages.append("The load-balancing loss of the experts is not added, because it depends on micro-batches")
    return model, messages


def load_for_inference(folder: Path, precision: str, context: DistributedContext) -> PreTrainedModel:
    """A model for evaluation and generation, sharded if the launcher shards weights.

    With sharded weights, all ranks must make the same calls, because each call gathers the weights from all ranks.
    """
    # Not all operations of generation have deterministic kernels, which training in the same process may have enabled.
    torch.use_deterministic_algorithms(False)
    if not context.sharded:
        model = load_model(folder, context.device, precision)
    else:
        model = load_to_shard(folder, context)
        context.shard(model)
    model.eval()
    return model


def load_to_shard(folder: Path, context: DistributedContext) -> PreTrainedModel:
    """The model on the CPU of the main process, and without weights on the other ranks."""
    return load_model(folder, torch.device("cpu")) if context.is_main_process else load_on_meta(folder)


def nf4(params: TrainParams, context: DistributedContext, base: Path) -> Any:
    """The quantization of QLoRA (https://arxiv.org/abs/2305.14314): 4-bit NormalFloat, with quantized constants.

    Raises:
        UserError: bitsandbytes is not installed, the weights are sharded, or the model has fused experts.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "finetuning: found 'qlora', which needs the package bitsandbytes; install it with "
            "`.venv/bin/pip install -c constraints.txt -e '.[qlora]'`, or use lora"
        )
    if context.sharded:
        raise UserError(
            "finetuning: found 'qlora' with a launcher that shards the weights (FSDP2); must be lora, or use another "
            "launcher"
        )
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
