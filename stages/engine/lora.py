"""LoRA (https://arxiv.org/abs/2106.09685): train low-rank adapters; the base weights are frozen.

`peft` injects the adapters into the model in place, so the engine needs no other code path.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.data.files import read_json
from stages.engine.models import load_as_stored
from stages.engine.optimizer import trainable_parameters
from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams

ALL = "all-linear"
ADAPTER = "adapter_model.safetensors"


def add_adapters(model: PreTrainedModel, params: TrainParams) -> str:
    """Freeze the model, and add adapters to the linear layers and experts that `lora_target_modules` names.

    Returns:
        A log message that says what is trained and, with all linear layers, which matrices have no adapter.

    Raises:
        UserError: nothing has one of the names, or peft can't adapt it.
    """
    try:
        inject_adapter_in_model(lora_config(model, params), model)
    except ValueError as error:
        raise UserError(f"lora_target_modules: peft can't adapt one of these layers: {error}; leave it out") from None
    for module in model.modules():
        if isinstance(module, ParamWrapper):  # it adds the adapter to the weight, in the weight's dtype
            weight = getattr(module.get_base_layer(), module.parameter_name)
            weight.data = weight.data.float()
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()  # peft gives adapters the dtype of their layer
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # A quantized weight has two parameters per byte.
    num_all = sum(parameter.numel() * (1 + (parameter.dtype == torch.uint8)) for parameter in model.parameters())
    adapted, frozen = adapted_and_frozen(model)
    message = f"LoRA of rank {params.lora_rank} on {adapted}: {num_trained:,} of {num_all:,} parameters are trained"
    if params.lora_target_modules != ALL or not frozen:
        return message
    if params.lora_dropout and any(expert_weights(model)):
        frozen += " (experts can have one if lora_dropout is 0)"
    return f"{message}; no adapter on {frozen}"


def lora_config(model: PreTrainedModel, params: TrainParams) -> LoraConfig:
    """The layers to adapt in the terms of peft, which adapts fused experts by the names of their parameters."""
    linear, experts = dict(linear_layers(model)), dict(expert_weights(model))
    for path in (excluded := sorted({*tied_layers(linear), *lost_in_loading(linear, model)})):
        del linear[path]
    names = sorted({short_name(path) for path in (*linear, *experts) if not is_refused(path, model)})
    paths = [path for path in (*linear, *experts) if short_name(path) in names]
    targets = names if params.lora_target_modules == ALL else params.lora_target_modules
    if unknown := [name for name in targets if not select(name, paths)]:
        reason = ", which peft can't adapt" if select(unknown[0], [*linear, *excluded]) else ""
        raise UserError(
            f"lora_target_modules: found {unknown[0]!r}{reason}; must be {ALL}, or a list of this model's linear layers"
            f"{' and fused experts' if experts else ''}: {', '.join(names)}"
        )
    modules = [name for name in targets if select(name, linear)]
    taken = [name for name in modules if is_taken_for_experts(name, model)]
    by_parameter = [name for name in targets if name in taken or select(name, experts)]
    if by_parameter and params.lora_dropout and params.lora_target_modules != ALL:
        raise UserError(
            f"lora_dropout: found {params.lora_dropout}; must be 0 with adapters on {by_parameter[0]}, for which peft "
            "has no dropout, or leave it out of lora_target_modules"
        )
    parameters = {f"{name}.weight" for name in taken}
    parameters |= {name + experts[path] for name in targets for path in select(name, experts)}
    return LoraConfig(
        r=params.lora_rank,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=[name for name in modules if name not in taken],
        exclude_modules=excluded or None,
        target_parameters=None if params.lora_dropout else sorted(parameters),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),  # GPT-2's matrices are transposed
        task_type="CAUSAL_LM",
    )


def short_name(path: str) -> str:
    """The last part of a path; the whole path if this is a number, by which peft would find other modules."""
    name = path.rpartition(".")[2]
    return path if name.isdigit() else name


def tied_layers(layers: Mapping[str, torch.nn.Module]) -> list[str]:
    """The layers that share their matrix with others, to which different adapters could not be merged."""
    uses = Counter(id(layer.weight) for layer in layers.values())
    return [path for path, layer in layers.items() if uses[id(layer.weight)] > 1]


def is_refused(path: str, model: PreTrainedModel) -> bool:
    """Whether it is a layer of Mamba that peft refuses, because a kernel reads its weights."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, short_name(path))
    except ValueError:
        return True
    return False


def lost_in_loading(paths: Iterable[str], model: PreTrainedModel) -> list[str]:
    """The layers whose saved adapters peft renames in loading, as if they were of before transformers 5."""
    keys = {f"base_model.model.{path}.lora_A.weight": torch.empty(1, 1) for path in paths}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), keys)
    return [path for path, key in zip(paths, keys, strict=True) if key not in loaded]


def is_taken_for_experts(name: str, model: PreTrainedModel) -> bool:
    """Whether peft takes linear layers of this name for experts of before transformers 5, which were not fused.

    It would adapt the fused experts instead, unless the layers' weights are named as parameters.
    """
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of several layers that were fused
        return True
    return name not in (config.target_modules or ())


def select(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that end with the name."""
    return [path for path in paths if f".{path}".endswith(f".{name}")]


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """The model's linear layers by path, without the head, whose matrix is often the token embedding.

    Subclasses that return something else, such as routers, are left out, because peft adds to what a layer returns.
    """
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        kind = type(module)
        is_special = kind.__module__.startswith("transformers.models.") and kind.__name__ != "FalconLinear"
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and not is_special:
            yield path, module


def expert_weights(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """The fused weights of experts, which have three dimensions: path without a final `.weight`, and this ending."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim == 3 and "Expert" in type(module).__name__:
                short = name.removesuffix(".weight")
                yield short, name[len(short) :]


def adapted_and_frozen(model: PreTrainedModel) -> tuple[str, str]:
    """The matrices with and without an adapter, except token embedding and head: names and how many have the name."""
    adapted = set()
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            adapted.add(f"{path}.{name}".replace(".base_layer", ""))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    skipped = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
    frozen = {
        name.replace(".base_layer", "")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not parameter.requires_grad and id(parameter) not in skipped
    }
    return count_names(adapted), count_names(frozen - adapted)


def count_names(parameters: Iterable[str]) -> str:
    """Such as "experts.down_proj (2), self_attn.q_proj (2)"."""
    # A number before the last part is that of a layer.
    names = Counter(
        re.sub(r"^\d+\.", "", ".".join(name.removesuffix(".weight").split(".")[-2:])) for name in parameters
    )
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(names.items()))


def without_gradient(model: PreTrainedModel) -> str:
    """The adapters in which training has changed nothing, such as those of a part for images; like `count_names`."""
    weights = trainable_parameters(model)
    return count_names(
        name.replace(".base_layer", "").removesuffix(".lora_B.default.weight")
        for name, weight in weights.items()
        if ".lora_B." in name and not weight.any()  # where it begins
    )


def save_adapter(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Write the adapters in the format of `peft`, with the Hub id or the path of the base model."""
    source = read_json(base / "source.json")
    config: Any
    (config,) = model.peft_config.values()
    config.base_model_name_or_path = source["model_name"] if source["revision"] else str(base)
    config.revision = source["revision"]
    for name in ("target_modules", "target_parameters"):  # as sets, their order would differ between runs
        setattr(config, name, (names := getattr(config, name)) and sorted(names))
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
