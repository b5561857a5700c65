"""Loading in fp32, the checkpoint's dtype, bf16 only with bf16 instructions, and the recorded environment."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from stages.engine import models
from stages.runtime.environment import LIBRARIES, environment
from tests.tiny_models import tiny_model as random_tiny_model

CPU = torch.device("cpu")


def test_weights_are_loaded_in_fp32_whatever_the_checkpoint_has(tiny_model: Path) -> None:
    assert models.checkpoint_dtype(tiny_model) == torch.bfloat16
    assert {parameter.dtype for parameter in models.load_model(tiny_model).parameters()} == {torch.float32}


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


@pytest.mark.parametrize(
    ("precision", "has_bf16", "expected"),
    [("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False)],
)
def test_auto_precision_uses_bf16_only_with_bf16_instructions(
    precision: str, has_bf16: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert models.uses_bf16(precision, torch.device("cpu")) is expected


def test_autocast_runs_matmuls_in_bf16_and_keeps_weights_in_fp32() -> None:
    layer = torch.nn.Linear(2, 2)
    with models.autocast("bf16", torch.device("cpu")):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    assert isinstance(models.autocast("fp32", torch.device("cpu")), nullcontext)


def test_environment_has_library_versions_and_processor() -> None:
    found = environment(torch.device("cpu"))
    assert list(found) == ["python", *LIBRARIES, "device"]
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["device"].startswith("cpu, ")
    assert found["device"].endswith(f", {torch.get_num_threads()} threads")
