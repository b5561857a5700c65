"""Micro-batches and activation checkpointing are chosen so that training fits; the results do not depend on them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import modeling_utils

from stages import train
from stages.engine.batches import Batches, Limits, MicroBatch, PackedBatches, PaddedBatches
from stages.engine.memory import check_checkpointing, find_fit, largest_micro_batch, use_deterministic_kernels
from stages.runtime.errors import UserError
from tests.clone import edit
from tests.conftest import example
from tests.test_loss import CONFIGS
from tests.tiny_models import random_model, tiny_model

LONGEST = example([5, 6, 7, 8], [9, 10, 11, 12, 13, 2])


class Device:
    """A device on which a micro-batch of more than `num_tokens` tokens does not fit; checkpointing doubles this."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.model = random_model(CONFIGS["llama"])
        self.trials: list[tuple[int, bool]] = []

    def try_step(self, micro_batch: MicroBatch) -> int:
        checkpointing = self.model.is_activation_checkpointing
        self.trials.append((micro_batch.num_tokens, checkpointing))
        if micro_batch.num_tokens > self.num_tokens * (1 + checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return 7_000

    def fit(self, batches: Batches, choices: list[bool], num_batches: int = 1) -> tuple[Limits, bool, int]:
        return find_fit(self.model, batches, LONGEST, choices, num_batches, self.try_step)


PADDED = PaddedBatches(Limits(45, 100))  # four of the longest example


def test_activation_checkpointing_comes_before_smaller_micro_batches() -> None:
    device = Device(20)
    assert device.fit(PADDED, [False, True]) == (Limits(45, 100), True, 7_000)
    device = Device(10)
    assert device.fit(PADDED, [False, True]) == (Limits(22, 50), True, 7_000)
    assert device.trials == [(40, False), (40, True), (20, True)]
    assert Device(20).fit(PADDED, [False]) == (Limits(22, 50), False, 7_000)


def test_a_micro_batch_is_as_much_of_the_effective_batch_as_fits() -> None:
    assert Device(10_000).fit(PADDED, [False, True], 4) == (Limits(180, 400), False, 7_000)
    assert Device(90).fit(PADDED, [False, True], 4) == (Limits(90, 200), False, 7_000)
    device = Device(35)
    device.fit(PADDED, [False], 3)
    assert device.trials == [(130, False), (90, False), (40, False), (20, False)]
    device = Device(30)
    assert device.fit(PADDED, [False, True], 2) == (Limits(45, 100), True, 7_000)
    assert device.trials == [(90, False), (40, False), (40, True)]


def test_an_example_that_does_not_fit_is_an_error_with_the_parameters_that_help() -> None:
    with pytest.raises(UserError) as error:
        Device(3).fit(PADDED, [False, True])
    assert str(error.value) == (
        "an example of 10 tokens does not fit into this GPU's memory, a tenth of which stays free; lower max_length, "
        "set finetuning to lora or qlora, or use a launcher that shards the weights"
    )


def test_another_error_of_the_device_is_not_hidden() -> None:
    def broken(_: MicroBatch) -> int:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        find_fit(random_model(CONFIGS["llama"]), PADDED, LONGEST, [False, True], 1, broken)


@pytest.mark.parametrize(
    ("limits", "num_examples", "num_supervised"),
    [(Limits(45, 100), 4, 36), (Limits(45, 13), 4, 8), (Limits(1000, 500), 100, 500), (Limits(5, 5), 1, 9)],
)
def test_the_largest_micro_batch_reaches_both_limits(limits: Limits, num_examples: int, num_supervised: int) -> None:
    for batches in (PaddedBatches(limits), PackedBatches(limits), PackedBatches(limits, share_prefix=False)):
        found = largest_micro_batch(batches, LONGEST)
        assert len(found.examples) == num_examples
        assert sum(example.num_supervised for example in found.examples) == num_supervised


@pytest.mark.parametrize(
    ("name", "finetuning", "precision"),
    [("gpt2", "full", "fp32"), ("llama", "full", "bf16"), ("gemma3_text", "full", "fp32"), ("mixtral", "lora", "bf16")],
)
def test_activation_checkpointing_gives_the_same_bytes(
    training_inputs: Path, monkeypatch: pytest.MonkeyPatch, name: str, finetuning: str, precision: str
) -> None:
    tiny_model(name).save_pretrained("models/base")
    checkpoint = Mock(wraps=modeling_utils.checkpoint)
    monkeypatch.setattr(modeling_utils, "checkpoint", checkpoint)
    outcomes = []
    for setting in ("off", "on"):
        edit(training_inputs, max_steps="3", warmup_steps="0", finetuning=finetuning, precision=precision)
        edit(training_inputs, activation_checkpointing=setting)
        train.main()
        assert checkpoint.called is (setting == "on")
        outcomes.append([Path(name).read_bytes() for name in ("models/tuned/model.safetensors", "metrics/curve.csv")])
        shutil.rmtree("models/tuned")
    assert outcomes[0] == outcomes[1]


@pytest.fixture
def deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_kernels_are_deterministic_if_all_operations_of_a_step_have_such_kernels() -> None:
    def operation(name: str) -> Callable[[], None]:
        def step() -> None:
            if torch.are_deterministic_algorithms_enabled():
                raise RuntimeError(f"{name} does not have a deterministic implementation, but you set 'x'. You can ...")

        return step

    assert use_deterministic_kernels(lambda: None) == "Kernels: deterministic"
    assert torch.are_deterministic_algorithms_enabled()
    assert use_deterministic_kernels(operation("histc_cuda")) == (
        "Kernels: not deterministic (histc_cuda does not have a deterministic implementation)"
    )
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        use_deterministic_kernels(Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))


def test_a_model_without_support_is_an_error_if_checkpointing_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS["llama"])
    assert check_checkpointing(model, "auto") == [False, True]
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert [check_checkpointing(model, setting) for setting in ("auto", "off")] == [[False], [False]]
    with pytest.raises(UserError) as error:
        check_checkpointing(model, "on")
    assert str(error.value) == (
        "activation_checkpointing: found 'on'; LlamaForCausalLM does not support it; must be auto or off"
    )
