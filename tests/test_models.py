"""Loading in fp32, the checkpoint's dtype, bf16 only with bf16 instructions, and the recorded environment."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from stages.engine import models
from stages.runtime.environment import LIBRARIES, environment


def test_weights_are_loaded_in_fp32_whatever_the_checkpoint_has(tiny_model: Path) -> None:
    assert models.checkpoint_dtype(tiny_model) == torch.bfloat16
    assert {parameter.dtype for parameter in models.load_model(tiny_model).parameters()} == {torch.float32}


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
