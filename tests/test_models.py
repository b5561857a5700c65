"""Loading in fp32, the checkpoint's dtype, bf16 only with bf16 instructions, and the recorded environment."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from stages.engine import models
from stages.engine.environment import LIBRARIES, environment
from tests.tiny_models import tiny_model as random_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen3", "gemma3_text", "mistral", "opt", "phi3", "mixtral", "lfm2", "mamba", "falcon_h1"]
)
def test_matrices_stored_in_bf16_give_the_bits_of_autocast_and_the_probe_computes_in_fp32(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    random_tiny_model(name).to(dtype).save_pretrained(tmp_path)
    plain, stored = (models.load_model(tmp_path, CPU, precision).eval() for precision in ("fp32", "bf16"))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), models.autocast("bf16", CPU):
        assert torch.equal(plain(ids).logits, stored(ids).logits)
    dtypes = {parameter: parameter.dtype for parameter in stored.parameters()}
    assert torch.bfloat16 in dtypes.values()
    with models.probing(stored):
        logits = stored(ids).logits
    assert logits.dtype == torch.float32
    assert {parameter: parameter.dtype for parameter in stored.parameters()} == dtypes
    if dtype == torch.bfloat16:  # otherwise the stored matrices are rounded
        with torch.no_grad():
            torch.testing.assert_close(logits, plain(ids).logits, rtol=0, atol=0)


def test_tensors_that_a_bf16_checkpoint_stores_in_fp32_are_not_rounded(tmp_path: Path) -> None:
    model = random_tiny_model("llama").to(torch.bfloat16)
    model.model.norm.weight.data = torch.full((32,), 1.0001)  # 1 in bf16
    model.save_pretrained(tmp_path)
    assert models.checkpoint_dtype(tmp_path) == torch.bfloat16
    loaded = models.load_model(tmp_path, CPU, "bf16")
    assert loaded.model.norm.weight.tolist() == pytest.approx([1.0001] * 32, rel=1e-6)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "falcon_mamba", "bert"])
def test_a_model_in_its_stored_dtype_gives_the_bits_of_fp32_in_the_probe(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    random_tiny_model(name).to(dtype).save_pretrained(tmp_path)
    plain, stored = models.load_model(tmp_path, CPU).eval(), models.load_as_stored(tmp_path, CPU)
    before = {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in stored.named_parameters()}
    assert {found for found, _ in before.values()} == {dtype}
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), models.probing(stored):
        assert torch.equal(plain(ids).logits, stored(ids).logits)
    assert before == {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in stored.named_parameters()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_computing_buffers_again_takes_no_memory_for_weights(name: str, tmp_path: Path) -> None:
    random_tiny_model(name).to(torch.bfloat16).save_pretrained(tmp_path)
    model = models.load_as_stored(tmp_path, CPU)
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device == CPU:
                sizes.append(result.numel())
            return result

    with Allocations():  # type: ignore[no-untyped-call]
        models.widen_buffers(model)
    assert max(sizes, default=0) <= 128  # of a vector; matrices have at least 1,024 elements


def test_tensors_that_transformers_keeps_in_fp32_do_not_widen_the_others(tmp_path: Path) -> None:
    random_tiny_model("dots1").save_pretrained(tmp_path / "fp32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).save_pretrained(tmp_path / "mixed")
    assert models.stored_dtype(tmp_path / "fp32") == torch.float32
    assert models.stored_dtype(tmp_path / "mixed") == torch.bfloat16
    dtypes = {
        name: parameter.dtype for name, parameter in models.load_as_stored(tmp_path / "mixed").state_dict().items()
    }
    in_fp32 = [name for name, dtype in dtypes.items() if dtype == torch.float32]
    assert in_fp32 == ["model.layers.1.mlp.gate.e_score_correction_bias"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_a_model_is_saved_in_shards_with_the_tensors_of_one_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    random_tiny_model(name).save_pretrained(tmp_path / "source")
    monkeypatch.setattr(models, "SHARD_SIZE", "50KB")
    models.save_model(models.load_model(tmp_path / "source", CPU), tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    tensors: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "shards").glob("*.safetensors"):
        tensors |= load_file(path)
    expected = load_file(tmp_path / "source/model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert not [warning for warning in recwarn if "offloaded" in str(warning.message)]


@pytest.mark.parametrize(
    ("precision", "has_bf16", "expected"),
    [("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False)],
)
def test_auto_precision_uses_bf16_only_with_bf16_instructions(
    precision: str, has_bf16: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    assert models.uses_bf16(precision, torch.device("cpu")) is expected


def test_environment_has_library_versions_and_processor() -> None:
    found = environment(torch.device("cpu"))
    assert list(found) == ["python", *LIBRARIES, "device"]
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["device"].startswith("cpu, ")
    assert found["device"].endswith(f", {torch.get_num_threads()} threads")
