"""Measure the memory of the stages that load a model, with a model of 4.3 GB: `python -m benchmarks.large_models`.

Prints the table of `docs/scaling.md`. The weights are random; the tokenizer is that of the workspace.
"""

import sys
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig

from benchmarks.data import write_project
from benchmarks.scaling import run
from stages.data.files import write_json
from stages.data.tokenizer import load_tokenizer
from stages.engine.models import load_on_meta
from stages.runtime.yaml12 import parse_yaml

ROWS = 40
STAGES = {
    "download_dataset": "",
    "download_model": "with its probes",
    "format": "",
    "score_rows": "",
    "split": "",
    "train": "two steps of LoRA, and merging",
    "predict tuned": "",
    "export": "",
}
CHANGES = {
    "finetuning": "lora",
    "max_steps": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 256,
    "max_new_tokens": 4,
}


def main() -> None:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare_project(folder, config)
        size = sum(path.stat().st_size for path in (folder / "large").glob("*.safetensors"))
        print(f"Weights: {size / 1e9:.2f} GB\n\n| stage | | memory (GB) |\n|---|---|---|")
        for stage, note in STAGES.items():
            package = "tools" if stage == "export" else "stages"
            measured = run([sys.executable, "-m", *f"{package}.{stage}".split()], folder)
            if note or stage in ("predict tuned", "export"):
                print(f"| `{stage}` | {note} | {measured['anonymous_memory_bytes'] / 1e9:.2f} |", flush=True)


def prepare_project(folder: Path, config: PreTrainedConfig) -> None:
    """Write a project whose base model is a random one with this configuration."""
    write_project(folder, ROWS, links=("templates", "dvc.yaml", "stages"))
    make_model(folder / "large", config)
    params = parse_yaml(Path("params.yaml").read_text(encoding="utf-8"))
    write_json(folder / "params.yaml", params | CHANGES | {"model_name": "large"})


def make_model(folder: Path, config: PreTrainedConfig) -> None:
    """Write random weights in bf16, one shard per layer; never more than a shard is in memory."""
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(folder)
    config.vocab_size, config.dtype = len(tokenizer), torch.bfloat16
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    shapes = [(name, weight.shape) for name, weight in load_on_meta(folder).state_dict().items()]
    for number, (_, shard) in enumerate(groupby(shapes, lambda item: item[0].split(".")[:3])):
        tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shard}
        path = folder / f"model-{number}.safetensors"
        save_file(tensors, path, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


if __name__ == "__main__":
    main()
