"""Private names of other libraries, which may be gone in the next version: each is used only where a table says."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage
from huggingface_hub import HfApi, utils
from peft.tuners import tuners_utils
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map, load_gguf_checkpoint

from stages.download_model import cache_gguf_reader
from stages.runtime import hub
from tests.clone import ROOT
from tests.tiny_models import tiny_model

PACKAGES = ("stages", "review", "tools", "benchmarks", ".ci")
DOCUMENTED = {"_exit"}  # of `os`
# For each name: the modules that use it, and an object that has it; None if it has a test of its own.
NAMES: dict[str, tuple[set[str], Any]] = {
    "_attn_implementation": ({"attention.py"}, PreTrainedConfig()),
    "_can_set_attn_implementation": ({"attention.py"}, PreTrainedModel),
    "_check_lora_target_modules_mamba": ({"lora.py"}, tuners_utils),
    "_get_dtype_plan": ({"models.py"}, PreTrainedModel),
    "_http": ({"hub.py"}, utils),
    "_no_split_modules": ({"models.py"}, PreTrainedModel),
    "_weight_conversions": ({"models.py"}, None),
    "default_client_factory": ({"hub.py"}, utils._http),
    "hash_info": ({"outdated.py"}, Output(Stage(Repo(uninitialized=True)), "file")),
}


def private_names(path: Path) -> set[str]:
    """Private attributes of other objects than `self`, also by `getattr`, and private names that are imported."""
    names: set[str] = set()
    of_this_module: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(PACKAGES):
            names |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            names |= {str(name.value) for name in node.args if isinstance(name, ast.Constant)}
        elif isinstance(node, ast.FunctionDef):
            of_this_module.add(node.name)
    return {
        name
        for name in names - of_this_module - DOCUMENTED
        if name in NAMES or (name.startswith("_") and not name.startswith("__"))
    }


def test_each_private_name_is_used_only_where_this_table_says() -> None:
    used: dict[str, set[str]] = {}
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            for name in private_names(path):
                used.setdefault(name, set()).add(path.name)
    assert used == {name: modules for name, (modules, _) in NAMES.items()}


@pytest.mark.parametrize("name", [name for name, (_, owner) in NAMES.items() if owner is not None])
def test_the_pinned_version_has_the_private_name(name: str) -> None:
    modules, owner = NAMES[name]
    assert hasattr(owner, name), f"{', '.join(sorted(modules))} need {name}; find what replaces it in the new version"


def test_a_loaded_model_has_the_conversions_that_saving_undoes(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)  # its experts are fused in loading
    (conversion, *_) = AutoModelForCausalLM.from_pretrained(tmp_path)._weight_conversions
    assert len(conversion.target_patterns) == 1


def test_transformers_reads_gguf_files_with_the_functions_that_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, getattr(gguf, name))  # restores it after the test
    cache_gguf_reader()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for _ in range(2):
        load_gguf_checkpoint(tmp_path / "tiny.gguf")
    get_gguf_hf_weights_map(tiny_model("llama"), TensorProcessor())
    caches: list[Any] = [gguf.GGUFReader, gguf.get_tensor_name_map]
    assert [cache.cache_info().misses for cache in caches] == [1, 1]
    assert all(cache.cache_info().hits > 0 for cache in caches)


def test_downloads_need_the_default_client_for_redirects_and_its_own_hooks() -> None:
    client = hub._client()
    assert client.follow_redirects
    assert [hook.__module__ for hook in client.event_hooks["request"]] == ["huggingface_hub.utils._http", hub.__name__]


def test_faults_of_the_hub_client_are_recognized_by_the_modules_that_send_requests() -> None:
    modules = ("file_download", "hf_api", "hf_file_system", "_snapshot_download", "utils._auth", "utils._http")
    for name in (*modules, "utils._headers"):
        assert find_spec(f"huggingface_hub.{name}"), name
        assert hub.CLIENT.fullmatch(f"huggingface_hub.{name}")
    assert hub.CLIENT.fullmatch(HfApi.__module__)
