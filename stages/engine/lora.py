"""LoRA (https://arxiv.org/abs/2106.09685): train low-rank adapters; the base weights are frozen.

`peft` injects the adapters into the model in place, so the engine needs no other code path.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.engine.models import load_as_stored
from stages.engine.optimizer import trainable_parameters
from stages.runtime.errors import UserError
from stages.runtime.files import read_json
from stages.runtime.params import TrainParams

ALL = "all-linear"
ADAPTER = "adapter_model.safetensors"


def add_adapters(model: PreTrainedModel, params: TrainParams) -> str:
    """Freeze the model and add adapters to the linear layers that `lora_target_modules` names.

    Returns:
        A log message that says what is trained.

    Raises:
        UserError: no linear layer has one of the names, or peft does not support one of them.
    """
    linear = dict(linear_layers(model))
    names = sorted({name.rpartition(".")[2] for name in linear})
    target_modules = names if params.lora_target_modules == ALL else params.lora_target_modules
    if unknown := [name for name in target_modules if not any(f".{path}".endswith(f".{name}") for path in linear)]:
        raise UserError(
            f"lora_target_modules: found {unknown[0]!r}; "
            f"must be {ALL}, or a list of this model's linear layers: {', '.join(names)}"
        )
    config = LoraConfig(
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=target_modules,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),  # GPT-2's matrices are transposed
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # such as layers of Mamba whose weights are read by a kernel
        raise UserError(
            f"lora_target_modules: peft can't adapt one of these layers: {str(error).rstrip('.')}; "
            f"must be a list without it, from: {', '.join(names)}"
        ) from None
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()  # peft gives adapters the dtype of their layer
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # A quantized weight has two parameters per byte.
    num_all = sum(parameter.numel() * (1 + (parameter.dtype == torch.uint8)) for parameter in model.parameters())
    layers = ", ".join(target_modules)
    return f"LoRA of rank {params.lora_rank} on {layers}: {num_trained:,} of {num_all:,} parameters are trained"


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The model's linear layers by path, without the head, whose matrix is often the token embedding."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield path, module


def save_adapter(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Write the adapters in the format of `peft`, with the Hub id or the path of the base model."""
    source = read_json(base / "source.json")
    config: Any
    (config,) = model.peft_config.values()
    config.base_model_name_or_path = source["model_name"] if source["revision"] else str(base)
    config.revision = source["revision"]
    config.target_modules = sorted(config.target_modules)  # as a set, its order would differ between runs
    config.inference_mode = True
    config.save_pretrained(folder)
    # With "auto", peft asks the Hub whether the vocabulary was extended. Here the embeddings are frozen.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / ADAPTER)


@torch.no_grad()
def merge(base: Path, adapter: Path) -> PreTrainedModel:
    """The base model with saved adapters merged into its matrices, on the CPU, in the dtype of the checkpoint.

    One layer at a time is merged in fp32, so that each weight is rounded once.
    """
    with warnings.catch_warnings():
        # peft 0.21 uses the name from before transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = load_as_stored(base, torch.device("cpu"))
        loaded = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    for layer in loaded.modules():
        if isinstance(layer, BaseTunerLayer):
            parameters = [*layer.get_base_layer().parameters()]
            stored = [parameter.data for parameter in parameters]
            for parameter in parameters:
                parameter.data = parameter.data.float()
            layer.merge()
            for parameter, data in zip(parameters, stored, strict=True):
                parameter.data = data.copy_(parameter)
    merged: PreTrainedModel = loaded.unload()
    return merged
