"""A short version of `make chaos`, and tests that it detects problems."""

import json
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import chaos
from tests.chaos import Chaos, Reference
from tests.clone import copy_clone, environment, lock_hashes, make_clone, run

NUM_KILLS = 2  # `make chaos` has 100


@pytest.fixture(scope="module")
def reference(ran: Path) -> Reference:
    return Reference(ran, lock_hashes((ran / "dvc.lock").read_text()), seconds=30)


@pytest.mark.subprocess
@pytest.mark.usefixtures("fast_stages")
def test_a_killed_pipeline_has_the_results_of_an_uninterrupted_one(
    reference: Reference, tmp_path: Path, tiny_model: Path
) -> None:
    some = Chaos(reference, random.Random(0))
    while (kills := NUM_KILLS - some.kills.total()) > 0:  # again if DVC ignored a Ctrl-C between two stages
        some.run_until_done(make_clone(tmp_path / str(kills), tiny_model), ("dvc", "repro"), kills)
        assert some.problems == []
    assert some.seen["pipelines done"] >= 1


@pytest.mark.subprocess
@pytest.mark.usefixtures("fast_stages")
@pytest.mark.parametrize(
    ("number", "output"), [(signal.SIGKILL, ""), (signal.SIGTERM, ""), (signal.SIGINT, "Ctrl-C\n")]
)
def test_a_signal_to_a_forked_stage_acts_as_on_a_process(tmp_path: Path, number: signal.Signals, output: str) -> None:
    """This and other tests kill stages that run in forks."""
    code = "import os, time\ntry:\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/slow.py").write_text(f"{code}except KeyboardInterrupt: print('Ctrl-C')")
    command, pipe = ["python", ".ci/slow.py"], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=pipe, text=True, preexec_fn=chaos.heed_ctrl_c
    ) as process:
        assert process.stdout
        fork = psutil.Process(int(process.stdout.readline()))
        process.send_signal(number)
        assert process.stdout.read() == output
    fork.wait(10)  # raises if it still runs


@pytest.mark.subprocess
@pytest.mark.usefixtures("fast_stages")
def test_an_experiment_after_a_kill_that_left_a_deleted_output_staged_runs_after_git_reset(
    ran: Path, tmp_path: Path
) -> None:
    clone = copy_clone(ran, tmp_path / "clone")
    (clone / "metrics/new.json").write_text("{}")
    run(clone, "git", "add", "metrics/new.json")
    (clone / "metrics/new.json").unlink()
    failed = run(clone, "dvc", "exp", "run", "split", check=False)
    assert chaos.STAGED in failed.stderr
    run(clone, "git", "reset", "-q")
    assert run(clone, "dvc", "exp", "run", "split").returncode == 0


@pytest.fixture
def copy(reference: Reference, tmp_path: Path) -> Iterator[Path]:
    """A folder with hard links to the outputs of the reference."""
    for name, file in chaos.files_of(reference).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).hardlink_to(file)
    (tmp_path / "dvc.lock").write_text((reference.folder / "dvc.lock").read_text())
    yield tmp_path


def problems(reference: Reference, folder: Path) -> list[str]:
    some = Chaos(reference, random.Random(0))
    some.check_outputs(folder)
    return some.problems


MODEL = "models/tuned/model.safetensors"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("true", []),
        (f"head -c -1 {MODEL} > x; mv x {MODEL}", [f"{MODEL} differs or is incomplete"]),
        ("head -n 5 metrics/curve.csv > x; mv x metrics/curve.csv", []),  # the beginning of the complete one
        ("tail -n 5 metrics/curve.csv > x; mv x metrics/curve.csv", ["metrics/curve.csv differs or is incomplete"]),
        (
            "sed -i '/path: data.raw.parquet/,/md5: /s/md5: .*/md5: 0/' dvc.lock",
            ["dvc.lock has another hash of data/raw.parquet"],
        ),
        ("mkdir -p .scratch/train/abc/step-{1,2,3}", ["more than two checkpoints"]),
    ],
)
@pytest.mark.subprocess
def test_wrong_or_partial_outputs_are_detected(
    reference: Reference, copy: Path, damage: str, expected: list[str]
) -> None:
    run(copy, "bash", "-ec", damage)
    assert problems(reference, copy) == expected


def test_a_lock_that_a_kill_of_dvc_truncated_is_not_a_problem(reference: Reference, copy: Path) -> None:
    lock = (copy / "dvc.lock").read_text()
    for length in (0, 5, 16, 30, 200):
        (copy / "dvc.lock").write_text(lock[:length])
        assert problems(reference, copy) == []
    messages = [
        "'./dvc.lock' validation failed: expected a dictionary.",
        "'./dvc.lock' is invalid.",
        "Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is corrupted: Expecting value",
    ]
    found = [match[1] for match in map(chaos.CUT_LOCK.search, messages) if match]
    assert found == ["dvc.lock", "dvc.lock", ".dvc/tmp/rwlock"]


IN_DVC = (
    "ERROR: interrupted by the user\nException ignored in: <function tqdm.__del__ at 0x7fc0>\n"
    "Traceback (most recent call last):\n"
    '  File "site-packages/dvc/progress.py", line 136, in close\n    self.postfix["info"] = ""\n    ^^^^^^^\n'
    "AttributeError: 'Tqdm' object has no attribute 'postfix'\n"
)
IN_STAGE = "Traceback (most recent call last):\n  File 'stages/train.py'\nKeyError: 'loss'\n"
TRAINED = "training  loss 2.1, mean of the run\n"


@pytest.mark.parametrize(
    ("output", "checkpoint", "expected"),
    [
        ("Resuming from the checkpoint at step 1,200\n", 1200, []),
        (TRAINED, None, []),
        ("Resuming from the checkpoint at step 8\n", 16, ["training resumed from step 8, the newest intact "]),
        (TRAINED, 16, ["training resumed from step None, the newest intact "]),
        (IN_DVC, None, []),
        (IN_STAGE, None, ["a traceback:\n"]),
        (f"{IN_DVC}{IN_STAGE}", None, ["a traceback:\n"]),
    ],
)
def test_lost_work_and_a_traceback_are_detected_unless_a_progress_bar_of_dvc_was_interrupted(
    reference: Reference, output: str, checkpoint: int | None, expected: list[str]
) -> None:
    some = Chaos(reference, random.Random(0))
    some.count_events(output)
    some.check_resumed(output, checkpoint)
    assert all(problem.startswith(start) for problem, start in zip(some.problems, expected, strict=True))


def test_a_damaged_checkpoint_is_remembered_if_the_next_run_is_killed_before_it_notices(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("step-08", "step-16"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "state").write_bytes(b"abcd")
    some = Chaos(reference, random.Random(0))
    checkpoints = [tmp_path / "step-08", tmp_path / "step-16"]
    monkeypatch.setattr(some.random, "random", lambda: 0.0)  # damage one
    assert some.maybe_damage(checkpoints) == 8
    assert (tmp_path / "step-16/state").read_bytes() != b"abcd"
    monkeypatch.setattr(some.random, "random", lambda: 1.0)
    assert some.maybe_damage(checkpoints) == 8


def test_the_published_results_have_enough_kills_and_no_problem() -> None:
    results = json.loads(chaos.RESULTS.read_text())
    assert sum(results["kills"].values()) >= 100
    assert set(results["kills"]) == set(chaos.WAYS)
    assert results["problems"] == 0
