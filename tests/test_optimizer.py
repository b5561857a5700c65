"""AdamW with moments in 8 bits: its state, and runs that resume with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages import train
from stages.engine.optimizer import create_optimizer, optimizer_state, state_bytes
from stages.engine.schedule import Schedule
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit
from tests.test_train import curve, interruption, outcome, take_outcome


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


def test_losses_are_close_to_those_with_moments_in_fp32(training_inputs: Path) -> None:
    losses = []
    for optimizer in ("adamw", "adamw_8bit"):
        edit(training_inputs, optimizer=optimizer)
        train.main()
        losses.append([loss for _, loss in curve("loss")])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize(("finetuning", "precision"), [("full", "fp32"), ("full", "bf16"), ("qlora", "bf16")])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    training_inputs: Path, capsys: pytest.CaptureFixture[str], finetuning: str, precision: str
) -> None:
    edit(training_inputs, optimizer="adamw_8bit", finetuning=finetuning, lora_rank="64", precision=precision)
    train.main()
    (checkpoint,) = Path(".scratch/train").glob("*/step-00000020/tensors.safetensors")
    dtypes = {tensor.dtype for name, tensor in load_file(checkpoint).items() if name.endswith(".state1")}
    assert dtypes == {torch.uint8, torch.float32}  # of large and of small tensors
    expected = take_outcome()
    with interruption(14):
        train.main()
    capsys.readouterr()
    train.main()
    assert "Resuming from the checkpoint at step 10\n" in capsys.readouterr().out
    assert outcome() == expected
