"""What is checked before the weights of a model are loaded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages import train
from stages.engine import loading
from stages.engine.distributed import DistributedContext
from stages.engine.loading import check_memory, load_for_inference, load_for_training
from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit
from tests.test_loss import CONFIGS
from tests.test_train import ONE_PROCESS
from tests.tiny_models import random_model

pytestmark = pytest.mark.usefixtures("training_inputs")
BASE, CPU = Path("models/base"), torch.device("cpu")
QLORA, ADAMW_8BIT, ADAMW_BF16 = {"finetuning": "qlora"}, {"optimizer": "adamw_8bit"}, {"optimizer": "adamw_bf16"}


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded fails the test."""
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the model was loaded"))


SHARDED = DistributedContext(CPU, sharded=True)
WHEN_SHARDED = "with a launcher that shards the weights (FSDP2); must be"
NEEDS = "matrix multiplications; it needs finetuning: full and precision: bf16; or use adamw or adamw_8bit"


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        (QLORA, SHARDED, f"finetuning: found 'qlora' {WHEN_SHARDED} lora, or use another launcher"),
        (ADAMW_8BIT, SHARDED, f"optimizer: found 'adamw_8bit' {WHEN_SHARDED} adamw, or use another launcher"),
        (ADAMW_BF16, SHARDED, f"optimizer: found 'adamw_bf16' {WHEN_SHARDED} adamw, or use another launcher"),
        (
            ADAMW_8BIT,
            DistributedContext(torch.device("mps")),
            "optimizer: found 'adamw_8bit' on an Apple GPU (MPS), for which bitsandbytes has no such optimizer; must "
            "be adamw",
        ),
        (
            ADAMW_BF16 | {"precision": "fp32"},
            ONE_PROCESS,
            f"optimizer: found 'adamw_bf16' with finetuning: full and fp32 {NEEDS}",
        ),
        (
            ADAMW_BF16 | {"precision": "bf16", "finetuning": "lora"},
            ONE_PROCESS,
            f"optimizer: found 'adamw_bf16' with finetuning: lora and bf16 {NEEDS}",
        ),
    ],
)
def test_bitsandbytes_where_it_can_not_work_is_an_error(
    changes: dict[str, str], context: DistributedContext, message: str
) -> None:
    edit(Path.cwd(), **changes)
    with pytest.raises(UserError) as error:
        load_for_training(load_params(TrainParams), context)
    assert str(error.value) == message


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    ("changes", "start", "end"),
    [
        (QLORA, "finetuning: found 'qlora'", "or use lora"),
        (ADAMW_8BIT, "optimizer: found 'adamw_8bit'", "or use adamw"),
    ],
)
def test_bitsandbytes_that_is_not_installed_is_an_error_with_the_command(
    changes: dict[str, str], start: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(Path.cwd(), **changes)
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(UserError) as error:
        train.main()
    assert str(error.value) == (
        f"{start}, which needs the package bitsandbytes; install it with "
        f"`.venv/bin/pip install -c constraints.txt -e '.[bitsandbytes]'`, {end}"
    )


# The tiny model has 31,392 parameters: 12,800 of the tied embedding, 18,432 of matrices and 160 of norms.
FULL, FULL_8BIT = 16 * 31_392, 10 * 12_800 + 8 * 50 + 16 * (31_392 - 12_800)
LORA, QLORA_BYTES = 4 * 31_392, 4 * 12_960 + 18_432 // 2


WITH_LORA, WITH_QLORA = "finetuning: lora (126 kB), ", "finetuning: qlora (61.1 kB), or "


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    ("precision", "limit", "advice"),
    [
        (
            "bf16",
            FULL - 1,
            "set optimizer: adamw_8bit (426 kB), optimizer: adamw_bf16 (301 kB), finetuning: lora (88.7 kB), "
            f"{WITH_QLORA}",
        ),
        ("fp32", FULL - 1, f"set optimizer: adamw_8bit (426 kB), {WITH_LORA}{WITH_QLORA}"),
        ("fp32", FULL_8BIT - 1, f"set {WITH_LORA}{WITH_QLORA}"),
        ("fp32", LORA - 1, f"set {WITH_QLORA}"),
        ("fp32", QLORA_BYTES - 1, ""),
    ],
)
def test_a_limit_below_what_training_needs_is_an_error_with_what_would_fit(
    precision: str, limit: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(Path.cwd(), precision=precision)
    monkeypatch.setattr(loading, "memory_limit", lambda: (limit, "`ulimit -v`"))
    with pytest.raises(UserError) as error:
        train.main()
    start = "models/base: its weights, gradients and optimizer state need 502 kB of memory, besides activations; "
    assert str(error.value).startswith(f"{start}`ulimit -v` has ")
    assert str(error.value).endswith(f" kB; {advice}use a smaller model or more memory")


@pytest.mark.parametrize(
    ("changes", "needed"),
    [({}, FULL), (ADAMW_8BIT, FULL_8BIT), ({"finetuning": "lora"}, LORA), (QLORA, QLORA_BYTES)],
)
def test_what_fits_exactly_is_not_refused(
    changes: dict[str, str], needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(Path.cwd(), **changes)
    params = load_params(TrainParams)
    monkeypatch.setattr(loading, "memory_limit", lambda: (needed, "`ulimit -v`"))
    check_memory(BASE, ONE_PROCESS, "fp32", params)
    monkeypatch.setattr(loading, "memory_limit", lambda: (needed - 1, "`ulimit -v`"))
    with pytest.raises(UserError):
        check_memory(BASE, ONE_PROCESS, "fp32", params)


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 4), ("bf16", 2)])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_inference_needs_the_bytes_of_the_loaded_weights(
    architecture: str, precision: str, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(CONFIGS[architecture]).to(torch.bfloat16).save_pretrained(BASE)
    model = load_for_inference(BASE, precision, ONE_PROCESS)
    needed = sum(parameter.nbytes for parameter in model.parameters())
    assert factor <= needed / model.num_parameters() < factor + 1.5
    monkeypatch.setattr(loading, "memory_limit", lambda: (needed, "`ulimit -v`"))
    load_for_inference(BASE, precision, ONE_PROCESS)
    monkeypatch.setattr(loading, "memory_limit", lambda: (needed - 1, "`ulimit -v`"))
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"^models/base: its weights need "):
        load_for_inference(BASE, precision, ONE_PROCESS)


@pytest.mark.usefixtures("not_loaded")
def test_a_gpu_is_limited_by_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=FULL - 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    with pytest.raises(UserError, match="; this GPU has 502 kB; "):
        check_memory(BASE, DistributedContext(torch.device("cuda")), "fp32", load_params(TrainParams))
