"""AdamW with moments in 8 bits, and with weights in bf16: its state, and runs that resume with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages import train
from stages.data.examples import read_split
from stages.engine import adamw_8bit
from stages.engine.engine import Engine
from stages.engine.optimizer import create_optimizer, optimizer_state, state_bytes
from stages.engine.schedule import Schedule
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit
from tests.test_train import ONE_PROCESS, assert_resumes_to_the_same_bytes, curve


@pytest.mark.parametrize(
    ("optimizer", "sizes"), [("adamw", [8 * 65 * 64, 8 * 63 * 64]), ("adamw_8bit", [2 * 65 * 64 + 8 * 17, 8 * 63 * 64])]
)
def test_moments_of_large_tensors_take_two_bytes_in_8_bits(project: Path, optimizer: str, sizes: list[int]) -> None:
    edit(project, optimizer=optimizer)
    params = load_params(TrainParams)
    model = torch.nn.ParameterList([torch.randn(65, 64), torch.randn(63, 64)])
    adamw, _ = create_optimizer(model, params, Schedule.plan(params, 100))
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    adamw.step()
    tensors, _ = optimizer_state(adamw)
    constant = ("step", "qmap1", "qmap2")
    found = [
        sum(tensor.nbytes for name, tensor in tensors.items() if name[:12] == prefix and name[12:] not in constant)
        for prefix in ("optimizer.0.", "optimizer.1.")
    ]
    assert found == sizes
    assert [state_bytes(parameter.numel(), optimizer) for parameter in model] == sizes


@pytest.mark.parametrize("num_elements", [1024, 1025, 5000])
def test_large_tensors_are_updated_in_parts_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, num_elements: int
) -> None:
    weights, states = [], []
    for part_size in (2**20, 1024):
        monkeypatch.setattr(adamw_8bit, "PART_SIZE", part_size)
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(num_elements, 4, generator=generator))
        optimizer = adamw_8bit.AdamW8bit([weight], 0.1, weight_decay=0.1)
        for _ in range(3):
            weight.grad = torch.randn(4, num_elements, generator=generator).T  # not contiguous
            optimizer.step()
        weights.append(weight)
        states.append(optimizer_state(optimizer)[0])
    assert torch.equal(*weights)
    assert states[0]["optimizer.0.step"] == 3
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_losses_are_close_to_those_with_moments_and_weights_in_fp32(training_inputs: Path) -> None:
    losses = []
    for optimizer in ("adamw", "adamw_8bit", "adamw_bf16"):
        edit(training_inputs, optimizer=optimizer, precision="bf16")
        train.main()
        losses.append([loss for _, loss in curve("loss")])
    in_fp32, in_8bit, in_bf16 = losses
    assert in_fp32 != in_8bit != in_bf16
    assert in_8bit == pytest.approx(in_fp32, rel=1e-2)
    assert in_bf16 == pytest.approx(in_fp32, rel=2e-2)


@pytest.mark.parametrize("num_bits", [5, 13])
def test_the_mean_of_weights_that_are_rounded_at_random_is_exact(num_bits: int) -> None:
    weight = torch.nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16))
    optimizer = adamw_8bit.AdamWBf16([weight], 2.0**-num_bits, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 2.0**-num_bits, abs=2e-5)
    assert weight.dtype == torch.bfloat16


def test_matrices_and_their_gradients_are_in_bf16(training_inputs: Path) -> None:
    edit(training_inputs, optimizer="adamw_bf16", precision="bf16")
    params = load_params(TrainParams)
    examples = read_split(Path("data/train.parquet"))
    engine = Engine.load(params, examples, Schedule.plan(params, len(examples)), ONE_PROCESS)
    (batch,) = engine.prepare([examples[:16]])
    engine.train_step(batch)
    dtypes = {(weight.ndim, weight.dtype) for weight in engine.model.parameters()}
    assert dtypes == {(2, torch.bfloat16), (1, torch.float32)}
    assert engine.model.get_input_embeddings()(torch.tensor([1])).dtype == torch.float32


@pytest.mark.parametrize(
    ("optimizer", "finetuning", "precision"),
    [("adamw_8bit", "full", "fp32"), ("adamw_8bit", "qlora", "bf16"), ("adamw_bf16", "full", "bf16")],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    training_inputs: Path, capsys: pytest.CaptureFixture[str], optimizer: str, finetuning: str, precision: str
) -> None:
    edit(training_inputs, optimizer=optimizer, finetuning=finetuning, lora_rank="64", precision=precision)
    edit(training_inputs, num_epochs="2")
    assert_resumes_to_the_same_bytes(capsys, 8, 5)
    (checkpoint,) = Path(".scratch/train").glob("*/step-00000010/tensors.safetensors")
    dtypes = {tensor.dtype for name, tensor in load_file(checkpoint).items() if name.endswith(".state1")}
    assert dtypes == {torch.uint8, torch.float32}  # of large and of small tensors
