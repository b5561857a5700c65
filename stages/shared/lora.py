"""LoRA (https://arxiv.org/abs/2106.09685): beside each matrix of the model, which is frozen, a product of two thin ones
is trained. With `peft`, in place: the model stays what it was, and the engine computes it as before.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.shared.errors import UserError
from stages.shared.files import read_json
from stages.shared.models import load_model

ALL = "all-linear"
ADAPTER = "adapter_model.safetensors"


def add_adapters(model: PreTrainedModel, rank: int, alpha: int, dropout: float, target_modules: str | list[str]) -> str:
    """Freeze the model and put adapters beside the linear layers of these names, `ALL` for every one but the head.

    Returns:
        What is trained, for a person.

    Raises:
        UserError: no linear layer has one of the names.
    """
    linear = dict(linear_layers(model))
    names = sorted({name.rpartition(".")[2] for name in linear})
    wanted = names if target_modules == ALL else target_modules
    if unknown := [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in linear)]:
        raise UserError(
            f"lora_target_modules: found {unknown[0]!r}; "
            f"must be {ALL}, or a list of this model's linear layers: {', '.join(names)}"
        )
    conv1d = any(isinstance(layer, Conv1D) for layer in linear.values())  # of GPT-2: its matrices lie transposed
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=wanted,
        fan_in_fan_out=conv1d,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    return f"LoRA of rank {rank} beside {', '.join(wanted)}: {num_trained:,} of {num_all:,} parameters are trained"


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The model's linear layers by path. Not its head, whose matrix is often that of the token embeddings."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield path, module


def store_frozen_in_bf16(model: PreTrainedModel) -> None:
    """Round the frozen matrices as autocast does at each multiplication: the same bits, in half the memory."""
    for _, layer in linear_layers(model):
        for parameter in layer.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)


def save_adapter(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Write the adapters in the format of `peft`, which names the base model: on the Hub, if it came from there."""
    source = read_json(base / "source.json")
    config: Any
    (config,) = model.peft_config.values()
    config.base_model_name_or_path = source["model_name"] if source["revision"] else str(base)
    config.revision = source["revision"]
    config.target_modules = sorted(config.target_modules)  # as a set, its order would differ from run to run
    config.inference_mode = True
    config.save_pretrained(folder)
    # "auto" would ask the Hub whether the embeddings have grown: they are frozen.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / ADAPTER)


def merge(base: Path, adapter: Path) -> PreTrainedModel:
    """The base model with saved adapters added to its matrices: in fp32, in the memory of the processor."""
    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        # peft 0.21 asks for this by the name that it had before transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        loaded = PeftModel.from_pretrained(load_model(base, cpu), str(adapter), torch_device="cpu")
    merged: PreTrainedModel = loaded.merge_and_unload()
    return merged
