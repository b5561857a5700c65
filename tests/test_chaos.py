"""A short form of `make chaos`, and that it would see what it looks for."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import chaos
from tests.chaos import Chaos, Reference
from tests.clone import make_clone


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Reference:
    return Reference.of(make_clone(tmp_path_factory.mktemp("reference"), tiny_model))


def test_a_pipeline_that_is_killed_again_and_again_ends_as_if_it_never_was(
    reference: Reference, tmp_path: Path, tiny_model: Path
) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    some = Chaos(reference, random.Random(seed))
    while (kills := 6 - some.kills.total()) > 0:  # once, but for a Ctrl-C between stages, which DVC may pass over
        some.run_until_done(make_clone(tmp_path / str(kills), tiny_model), ("dvc", "repro"), kills)
        assert some.problems == []
    assert some.seen["pipelines done"] >= 1


@pytest.fixture
def copy(reference: Reference, tmp_path: Path) -> Iterator[Path]:
    """A folder with the outputs of the reference, as links."""
    for name, file in chaos.files_of(reference).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).hardlink_to(file)
    (tmp_path / "dvc.lock").write_text((reference.folder / "dvc.lock").read_text())
    yield tmp_path


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def problems(reference: Reference, folder: Path) -> list[str]:
    some = Chaos(reference, random.Random(0))
    some.check_whole(folder)
    return some.problems


def test_half_an_output_is_seen(reference: Reference, copy: Path) -> None:
    assert problems(reference, copy) == []
    whole = (copy / "models/tuned/model.safetensors").read_bytes()
    replace(copy / "models/tuned/model.safetensors", whole[:-1])
    assert problems(reference, copy) == ["models/tuned/model.safetensors is another or half of it"]


def test_a_curve_may_be_the_beginning_of_the_whole_one(reference: Reference, copy: Path) -> None:
    curve = copy / "metrics/curve.csv"
    lines = curve.read_bytes().splitlines(True)
    replace(curve, b"".join(lines[:5]))
    assert problems(reference, copy) == []
    replace(curve, b"".join(lines[1:5]))
    assert problems(reference, copy) == ["metrics/curve.csv is another or half of it"]


def test_a_lock_that_describes_something_else_is_seen(reference: Reference, copy: Path) -> None:
    lock = (copy / "dvc.lock").read_text()
    (copy / "dvc.lock").write_text(lock.replace(reference.hashes["data/raw.parquet"], "0" * 32))
    assert problems(reference, copy) == ["dvc.lock describes another data/raw.parquet"]


def test_a_lock_that_a_kill_of_dvc_cut_off_is_not_held_against_the_stages(reference: Reference, copy: Path) -> None:
    lock = (copy / "dvc.lock").read_text()
    for length in (0, 5, 16, 30, 200):
        (copy / "dvc.lock").write_text(lock[:length])
        assert problems(reference, copy) == []
    said = [
        "'./dvc.lock' validation failed: expected a dictionary.",
        "'./dvc.lock' is invalid.",
        "Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is corrupted: Expecting value",
    ]
    found = [match[1] for match in map(chaos.CUT_LOCK.search, said) if match]
    assert found == ["dvc.lock", "dvc.lock", ".dvc/tmp/rwlock"]


def test_three_checkpoints_are_seen(reference: Reference, copy: Path) -> None:
    for step in range(3):
        (copy / f".scratch/train/abc/step-{step}").mkdir(parents=True)
    assert problems(reference, copy) == ["more than two checkpoints"]


@pytest.mark.parametrize(
    ("output", "checkpoint", "expected"),
    [
        ("Going on from the checkpoint of step 1,200\n", 1200, []),
        ("training  loss 2.1, mean of the run\n", None, []),
        (
            "Going on from the checkpoint of step 8\n",
            16,
            ["training went on from step 8, the newest whole checkpoint is 16"],
        ),
        (
            "training  loss 2.1, mean of the run\n",
            16,
            ["training went on from step None, the newest whole checkpoint is 16"],
        ),
    ],
)
def test_lost_work_is_seen(reference: Reference, output: str, checkpoint: int | None, expected: list[str]) -> None:
    some = Chaos(reference, random.Random(0))
    some.check_resumed(output, checkpoint)
    assert some.problems == expected


def test_the_results_that_are_shown_are_of_enough_kills_and_without_a_problem() -> None:
    results = json.loads(chaos.RESULTS.read_text())
    assert sum(results["kills"].values()) >= 100
    assert set(results["kills"]) == set(chaos.WAYS)
    assert results["problems"] == 0
