"""Private names of other libraries that the engine and the review use, which may be gone in the next version.

`test_private_names.py` is about the other modules.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage
from peft.tuners import tuners_utils
from transformers import PreTrainedConfig, PreTrainedModel

from tests.clone import ROOT

# For each name: the modules that use it, and an object that has it.
NAMES: dict[str, tuple[set[str], Any]] = {
    "_attn_implementation": ({"attention.py"}, PreTrainedConfig()),
    "_can_set_attn_implementation": ({"attention.py"}, PreTrainedModel),
    "_check_lora_target_modules_mamba": ({"lora.py"}, tuners_utils),
    "_get_dtype_plan": ({"models.py"}, PreTrainedModel),
    "_is_avx512_bf16_supported": ({"models.py"}, torch.cpu),
    "_no_split_modules": ({"distributed.py", "models.py"}, PreTrainedModel),
    "_non_persistent_buffers_set": ({"models.py"}, torch.nn.Module()),
    "hash_info": ({"outdated.py"}, Output(Stage(Repo(uninitialized=True)), "file")),
}
OWN = {"_steps", "_report_another_run", "_fit_to_device"}  # of classes of this project


def private_names(path: Path) -> set[str]:
    """The private attributes of other objects than `self`, and the private names that are imported."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
    return {name for name in names if name in NAMES or (name.startswith("_") and not name.startswith("__"))} - OWN


def test_each_private_name_is_used_only_where_this_table_says() -> None:
    used: dict[str, set[str]] = {}
    for folder in ("stages/engine", "review", "tools", "benchmarks", ".ci"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in private_names(path):
                used.setdefault(name, set()).add(path.name)
    assert used == {name: modules for name, (modules, _) in NAMES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_pinned_version_has_the_private_name(name: str) -> None:
    modules, owner = NAMES[name]
    assert hasattr(owner, name), f"{', '.join(sorted(modules))} need {name}; find what replaces it in the new version"
