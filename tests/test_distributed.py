"""Training with several processes equals training with one. The tests use two CPU processes (gloo)."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages import train
from stages.data.examples import read_split
from stages.engine.batches import Limits, PackedBatches, PaddedBatches, partition_by_cost, shuffled_batches
from stages.engine.distributed import DistributedContext
from stages.engine.models import load_model
from tests.clone import copy_clone, edit, environment, run_pipeline
from tests.clone import run as run_in
from tests.conftest import example
from tests.fork_server import PYTHON
from tests.test_train import curve, interruption, outcome, take_outcome

pytestmark = [pytest.mark.subprocess, pytest.mark.usefixtures("fast_stages")]

TORCHRUN = "torchrun --standalone --nproc-per-node 2"
ACCELERATE = "accelerate launch --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
CPU = torch.device("cpu")
LIMITS = Limits(100, 100)
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}


def launch(launcher: str, *stage: str, **env: str) -> subprocess.Popen[str]:
    """Start a stage, by default train, in two processes. torchrun runs them with the program PYTHON_EXEC."""
    command = [*launcher.split(), "-m", *(stage or ["stages.train"])]
    log = Path("log").open("w")  # noqa: SIM115 (the process writes it)
    return subprocess.Popen(
        command,
        env=environment(PYTHON_EXEC=str(PYTHON), OMP_NUM_THREADS="1", **env),
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
    )


def finish(launcher: str, *stage: str, code: int = 0, **env: str) -> str:
    """The log of a stage that must end with this exit code."""
    with launch(launcher, *stage, **env) as process:
        process.wait(timeout=600)
    log = Path("log").read_text()
    assert process.returncode == code, log
    return log


def kill_after_a_checkpoint(launcher: str, **env: str) -> None:
    """Kill the launcher and all its processes with `kill -9`."""
    with launch(launcher, **env) as process:
        while process.poll() is None and not list(Path(".scratch").glob("train/*/step-*")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        for child in workers():
            child.kill()


def workers() -> list[psutil.Process]:
    """The processes in this folder; a launcher starts each in its own session."""
    processes = psutil.process_iter(["cwd"])
    return [process for process in processes if process.info["cwd"] == str(Path.cwd()) and process.pid != os.getpid()]


def curve_of(*columns: str) -> dict[str, list[float]]:
    return {column: [value for _, value in curve(column)] for column in columns}


@pytest.mark.usefixtures("training_inputs")
@pytest.mark.parametrize(
    ("launcher", "env", "finetuning", "killed", "processes"),
    [
        (TORCHRUN, {}, "full", "one process", "2 processes, weights replicated"),
        (TORCHRUN, SHARDED, "full", "", "2 processes, weights sharded (FSDP2)"),
        (
            f"{ACCELERATE} --use_fsdp --fsdp_version 2",
            {},
            "lora",
            "two processes",
            "2 processes, weights sharded (FSDP2)",
        ),
    ],
)
def test_two_processes_train_like_one_also_after_a_kill(
    launcher: str, env: dict[str, str], finetuning: str, killed: str, processes: str
) -> None:
    # Batches of 7 examples, of which the last of an epoch has one: the second process has none. Micro-batches of 140
    # tokens: the processes differ in their number.
    edit(Path.cwd(), batch_size="7", gradient_accumulation_steps="1", max_length="20", eval_steps="4")
    edit(Path.cwd(), num_epochs="6", save_steps="5", finetuning=finetuning, learning_rate="5e-3", launcher=launcher)
    load_model(Path("models/base")).save_pretrained("models/base")  # in fp32, so that the results are not rounded
    train.main()
    columns = ("loss", "validation_loss", "gradient_norm")
    expected, weights = curve_of(*columns), load_file("models/tuned/model.safetensors")
    assert expected["loss"][-1] < expected["loss"][0] - 0.2
    take_outcome()

    if killed == "one process":  # any number of processes can read a checkpoint
        with interruption(14):
            train.main()
    elif killed:
        kill_after_a_checkpoint(launcher, **env)
    log = finish(launcher, **env)
    assert f"Launcher: {launcher}: {processes}\n" in log
    assert log.count("Resuming from the checkpoint at step ") == bool(killed)  # only the main process prints
    for name, values in curve_of(*columns).items():
        assert values == pytest.approx(expected[name], rel=1e-5), name
    found = load_file("models/tuned/model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-5 * weight.norm(), name
    metrics = json.loads(Path("metrics/train.json").read_text())
    assert metrics["environment"]["processes"] == processes


@pytest.mark.usefixtures("training_inputs")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_bf16"])
def test_state_and_weights_are_equal_in_all_processes_so_a_resumed_run_gives_the_same_bytes(optimizer: str) -> None:
    # A resumed run gives both processes the state of the first one. So if theirs differed, the bytes would, too.
    edit(Path.cwd(), optimizer=optimizer, precision="bf16", launcher=TORCHRUN, save_steps="13")
    finish(TORCHRUN)
    expected = outcome()
    shutil.rmtree("models/tuned")
    log = finish(TORCHRUN)
    assert log.count("Resuming from the checkpoint at step 13") == 1
    assert outcome() == expected


def test_a_sharded_model_has_the_losses_and_answers_of_one_process(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "project"))
    edit(Path.cwd(), precision="fp32", max_new_tokens="6", launcher=TORCHRUN)
    run_pipeline(Path.cwd(), "predict@base", "generate@base")
    predictions, samples = Path("data/answers/base.parquet"), Path("metrics/samples/base.md")
    expected, answers = pq.read_table(predictions).to_pylist(), samples.read_text()
    for stage in ("stages.predict", "stages.generate"):
        log = finish(TORCHRUN, stage, "base", **SHARDED)
        assert log.count(f"Launcher: {TORCHRUN}: 2 processes, weights sharded (FSDP2)\n") == 1
        assert log.count("Generation: packed prompts\n") == 1  # only the main process prints
    assert samples.read_text() == answers
    for one, other in zip(expected, pq.read_table(predictions).to_pylist(), strict=True):
        assert other == one | {"loss": pytest.approx(one["loss"], rel=1e-5)}


@pytest.mark.parametrize(("is_on", "env"), [("true", SHARDED), ("true", {}), ("false", {})])
def test_training_rows_are_scored_by_several_processes_as_by_one(
    is_on: str, env: dict[str, str], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "project"))
    edit(Path.cwd(), precision="fp32", launcher=TORCHRUN, score_rows=is_on)
    run_pipeline(Path.cwd(), "score_rows")
    expected = pd.read_parquet("data/train_scores.parquet")
    assert expected.empty == (is_on == "false")
    Path("data/train_scores.parquet").unlink()
    finish(TORCHRUN, "stages.score_rows", **env)
    pd.testing.assert_frame_equal(pd.read_parquet("data/train_scores.parquet"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("training_inputs")
def test_an_error_in_one_process_ends_all() -> None:
    # The embedding of one token is NaN, and one example of the first step has it, so one of the processes fails.
    config = json.loads(Path("models/base/config.json").read_text())
    Path("models/base/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file("models/base/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][399] = float("nan")
    save_file(weights, "models/base/model.safetensors", metadata={"format": "pt"})
    table = pq.read_table("data/train.parquet")
    first_batch = next(shuffled_batches(read_split(Path("data/train.parquet")), 4, 42, 0))
    bad = next(example.example_id for example in first_batch if example.example_id != "0")
    rows = table.to_pylist()
    rows[int(bad)]["input_ids"][20] = 399
    pq.write_table(pa.Table.from_pylist(rows, table.schema), "data/train.parquet")

    edit(Path.cwd(), launcher=TORCHRUN)
    log = finish(TORCHRUN, code=1)
    assert re.search(
        rf"^error: (process 1: )?step 1: loss is nan; .* examples of data/train.parquet: .*\b{bad}\b", log, re.M
    )
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers() == []
    assert not Path("models/tuned").exists()


def test_weights_that_no_rank_uses_keep_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    used, used_elsewhere, unused = model = torch.nn.ParameterList(torch.zeros(2) for _ in range(3))
    used.grad = torch.ones(2)

    def all_reduce(tensor: torch.Tensor, *_: object, **__: object) -> Mock:
        """With another rank that uses the first two weights; their gradients are 3."""
        tensor += torch.tensor([0, 1, 0], dtype=torch.uint8) if tensor.dtype == torch.uint8 else 3
        return Mock()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    DistributedContext(CPU, world_size=2).all_reduce_gradients(model)  # type: ignore[arg-type]
    assert used.grad.tolist() == [4, 4]
    assert used_elsewhere.grad.tolist() == [3, 3]
    assert unused.grad is None  # so AdamW does not decay it


def test_examples_are_partitioned_by_cost() -> None:
    assert partition_by_cost([3, 9, 4, 1], 2) == [[1], [2, 0, 3]]
    assert partition_by_cost([5], 3) == [[0], [], []]
    assert partition_by_cost([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    # A prefix common to all costs nothing because it is computed once.
    examples = [example([5, 6, 7, 8], [9, 2]), example([5, 6, 7, 10, 11], [2])]
    assert PackedBatches(LIMITS).costs(examples) == [3, 3]
    assert PackedBatches(LIMITS, share_prefix=False).costs(examples) == [6, 6]
    assert PaddedBatches(LIMITS).costs(examples) == [6, 6]
    # All ranks together have the whole batch.
    examples = [example([5, 6 + n], [*range(20, 21 + n % 4), 2], str(n)) for n in range(11)]
    parts = partition_by_cost(PackedBatches(LIMITS).costs(examples), 3)
    assert sorted(index for part in parts for index in part) == list(range(11))
    assert [len(part) for part in parts] == [4, 4, 3]


def test_ranks_with_sharded_weights_call_the_model_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedContext, "gather", lambda *_: [2, 5])
    assert DistributedContext(CPU, world_size=2, sharded=True).num_padding_steps(2) == 3
    assert DistributedContext(CPU, world_size=2).num_padding_steps(2) == 0


def test_the_pipeline_trains_with_a_launcher(tmp_path: Path, ran: Path) -> None:
    clone = copy_clone(ran, tmp_path / "clone")
    edit(clone, launcher=TORCHRUN)
    output = run_in(clone, "dvc", "repro", "train", PYTHON_EXEC=str(PYTHON), OMP_NUM_THREADS="1").stdout
    assert f"> {TORCHRUN} -m stages.train\n" in output
    metrics = json.loads((clone / "metrics/train.json").read_text())
    assert metrics["environment"]["processes"] == "2 processes, weights replicated"
    assert metrics["best_step"] > 0
    assert (clone / "models/tuned/model.safetensors").exists()
