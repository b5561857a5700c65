"""The engine on a GPU: kernels, memory and determinism. Other tests of the engine also use a GPU if there is one."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import recursively_apply
from transformers import LlamaConfig

from stages import predict, train
from stages.data.examples import read_split
from stages.engine.attention import PackedLayout
from stages.engine.batches import Limits, PackedBatches
from stages.engine.distributed import DistributedContext
from stages.engine.engine import Engine
from stages.engine.probe import choose_batches
from stages.engine.schedule import Schedule
from stages.engine.varlen import VarlenLayout
from stages.runtime.errors import is_out_of_memory
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit
from tests.test_loss import CONFIGS, EXAMPLES, SLIDING_WINDOW, gradient
from tests.test_train import assert_resumes_to_the_same_bytes, curve, outcome, take_outcome
from tests.tiny_models import random_model, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
KERNEL = "Engine: packed batches with shared prefixes, variable-length kernel"


@pytest.fixture
def reset_memory_limit() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def limit_memory(num_bytes: float) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("prefix", [0, 1, 70])
def test_the_kernel_equals_padded_blocks_in_fp32_up_to_rounding(prefix: int, key_heads: int) -> None:
    torch.manual_seed(0)
    groups = [(prefix, [3, 1, 60]), (2, [2, 50])]
    tokens = prefix + 64 + 2 + 52
    query = torch.randn(tokens, 4, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(tokens, key_heads, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv"
    )
    weights = torch.randn(tokens, 4, 16, device="cuda")
    results = []
    for layout, dtype in ((PackedLayout, torch.float32), (VarlenLayout, torch.bfloat16)):
        on_gpu = recursively_apply(torch.Tensor.cuda, layout.build(groups))
        out = on_gpu.attend(query.to(dtype), key.to(dtype), value.to(dtype), 0.3, 0.0).float()
        results.append([out, *torch.autograd.grad((out * weights).sum(), [query, key, value])])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernel_is_chosen_in_bf16_and_its_gradient_is_as_close_to_fp32_as_that_of_blocks(name: str) -> None:
    model = random_model(CONFIGS[name]).cuda()
    batches, messages, _ = choose_batches(model.eval(), EXAMPLES, 30, "bf16")
    assert messages == [KERNEL]
    assert isinstance(batches, PackedBatches) and batches.layout is VarlenLayout
    exact = gradient(model, PackedBatches(Limits(1000, 1000)))
    errors = [
        (gradient(model, PackedBatches(Limits(1000, 1000), layout=layout), "bf16") - exact).norm()
        for layout in (PackedLayout, VarlenLayout)
    ]
    assert 1e-5 * exact.norm() < errors[1] < 1.2 * errors[0]


def test_the_kernel_is_not_chosen_in_fp32_or_for_a_model_that_is_not_packed() -> None:
    assert choose_batches(random_model(CONFIGS["llama"]).cuda().eval(), EXAMPLES, 30, "fp32")[1] == [
        "Engine: packed batches with shared prefixes"
    ]
    _, (message,), _ = choose_batches(random_model(SLIDING_WINDOW).cuda().eval(), EXAMPLES, 30, "bf16")
    assert message.startswith("Engine: padded batches; packed batches with shared prefixes: losses differ by ")


@pytest.mark.parametrize(
    ("finetuning", "name"),
    [("full", "llama"), ("full", "gpt2"), ("full", "mixtral"), ("lora", "llama"), ("qlora", "llama")],
)
def test_two_runs_and_a_resumed_one_give_the_same_bytes(
    training_inputs: Path,
    capsys: pytest.CaptureFixture[str],
    finetuning: str,
    name: str,
) -> None:
    tiny_model(name).save_pretrained("models/base")
    edit(training_inputs, precision="bf16", finetuning=finetuning)
    train.main()
    expected = take_outcome()
    assert "Kernels: deterministic" in assert_resumes_to_the_same_bytes(capsys, 14, 10)
    assert outcome() == expected


def load_engine() -> Engine:
    params = load_params(TrainParams)
    examples = read_split(Path("data/train.parquet"))
    return Engine.load(params, examples, Schedule.plan(params, 22), DistributedContext(torch.device("cuda")))


def fit(batch_size: int, num_batches: int) -> tuple[int, bool, int]:
    """Tokens of the largest micro-batch, activation checkpointing, and the peak memory of this choice."""
    edit(Path.cwd(), batch_size=str(batch_size), gradient_accumulation_steps=str(num_batches))
    engine = load_engine()
    (tokens,) = re.findall(r"micro-batches of up to ([\d,]+) tokens", engine.messages[-1])
    return int(tokens.replace(",", "")), engine.model.is_activation_checkpointing, torch.cuda.max_memory_allocated()


@pytest.mark.usefixtures("training_inputs", "reset_memory_limit")
def test_micro_batches_get_smaller_then_checkpointing_is_enabled_if_memory_is_short() -> None:
    config = json.loads(Path("models/base/config.json").read_text())
    random_model(LlamaConfig(**config | {"num_hidden_layers": 16})).save_pretrained("models/base")
    tokens, checkpointing, peak = fit(64, 4)
    assert (tokens, checkpointing) == (64 * 4 * 256, False)
    limit_memory(0.7 * peak)
    assert fit(64, 4)[:2] == (64 * 2 * 256, False)
    torch.cuda.set_per_process_memory_fraction(1.0)
    tokens, checkpointing, peak = fit(256, 1)
    assert (tokens, checkpointing) == (256 * 256, False)
    limit_memory(0.7 * peak)
    tokens, checkpointing, peak = fit(256, 1)
    assert (tokens, checkpointing) == (256 * 256, True)
    limit_memory(0.7 * peak)
    assert fit(256, 1)[:2] == (128 * 256, True)


def test_an_error_of_the_allocator_is_recognized_as_lack_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2**50, device="cuda")
    assert is_out_of_memory(error.value)


def test_batches_are_prepared_ahead_in_page_locked_memory(training_inputs: Path) -> None:
    engine = load_engine()
    examples = read_split(Path("data/train.parquet"))
    first, second = engine.prepare([examples[:4], examples[4:8]])
    for batch in (first, second):
        assert all(micro_batch.labels.is_pinned() for micro_batch in batch.micro_batches)
        assert all(micro_batch.inputs["input_ids"].is_pinned() for micro_batch in batch.micro_batches)


def test_the_device_is_not_waited_for_within_an_effective_batch(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(training_inputs, precision="bf16")
    engine = load_engine()
    (batch,) = engine.prepare([read_split(Path("data/train.parquet"))[:4]])
    engine.train_step(batch)  # the first step initializes libraries
    (batch,) = engine.prepare([read_split(Path("data/train.parquet"))[4:8]])
    real = torch.nn.utils.clip_grad_norm_

    def after_the_batch(*args: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        return real(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", after_the_batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gpu_and_cpu_give_the_same_losses(training_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main()
    expected = [loss for _, loss in curve("loss")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.rmtree(".scratch")
    train.main()
    assert [loss for _, loss in curve("loss")] == pytest.approx(expected, rel=1e-4)


def test_predict_uses_the_kernel(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(training_inputs, precision="bf16")
    monkeypatch.setattr("sys.argv", ["predict", "base"])
    predict.main()
    log = capsys.readouterr().out
    assert f"{KERNEL}\n" in log
    assert "Generation: packed prompts\n" in log
