"""What the machine refuses: a message, no half output, and the next run succeeds once the cause is gone."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_params import edit

ROOT = Path(__file__).parent.parent
OUTPUTS = {
    "download_dataset": ["data/raw.parquet", "data/unreadable.parquet", "data/source.json"],
    "download_model": ["models/base", "models/tokenizer"],
    "format": ["data/formatted.parquet", "data/left_out.parquet", "metrics/format.json", "metrics/lengths.csv"],
    "split": ["data/train.parquet", "data/validation.parquet", "data/test.parquet", "metrics/split.json"],
    "train": ["models/tuned", "metrics/train.json", "metrics/curve.csv"],
    "evaluate": ["data/predictions/base.parquet", "metrics/evaluate/base.json", "metrics/evaluate/base.csv"],
    "generate": ["metrics/samples/base.md"],
}


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which any stage can run."""
    shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    edit(tmp_path / "project", max_new_tokens="4")
    return tmp_path / "project"


def run_stage(stage: str, before: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Exit code and standard error of a stage in a process of its own, in which `before` was called."""
    command = [sys.executable, "-m", f"stages.{stage}", *(["base"] if stage in ("evaluate", "generate") else [])]
    # No byte code: a process with a small disk would leave it cut off for the tests that run beside it.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=before)
    return result.returncode, result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""


def small_disk() -> None:
    """Files of 200 bytes at most: the calls that fail are those that fail on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))


def heed_permissions() -> None:
    """Root may read and write everything, unless it gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    pr_capbset_drop = 24
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(pr_capbset_drop, capability)


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_full_disk_is_said_leaves_nothing_and_then_it_goes_on(project: Path, stage: str) -> None:
    for output in OUTPUTS[stage]:
        shutil.rmtree(output) if Path(output).is_dir() else Path(output).unlink(missing_ok=True)
    code, message = run_stage(stage, small_disk)
    assert code == 1
    assert message.endswith("; raise the file size limit (`ulimit -f`) and run again")
    small = [output for output in OUTPUTS[stage] if Path(output).is_file() and Path(output).stat().st_size < 200]
    assert [output for output in OUTPUTS[stage] if Path(output).exists()] == small
    assert list(project.rglob("*.partial")) == []
    assert run_stage(stage) == (0, "")
    assert all(Path(output).exists() for output in OUTPUTS[stage])


@pytest.mark.parametrize(
    ("stage", "path", "mode", "where"),
    [
        ("download_dataset", "data/instructions.jsonl", 0o000, "data/instructions.jsonl: Permission denied"),
        ("format", "data/raw.parquet", 0o000, "Failed to open local file 'data/raw.parquet'. …"),
        ("split", "params.yaml", 0o000, "params.yaml: Permission denied"),
        ("train", "data/train.parquet", 0o000, "Failed to open local file 'data/train.parquet'. …"),
        ("train", "models/base/model.safetensors", 0o000, "models/base/model.safetensors: Permission denied"),
        ("generate", "models/tokenizer/tokenizer.json", 0o000, "models/tokenizer/tokenizer.json: Permission denied"),
        ("split", "data", 0o500, "data/.train.parquet.partial: Permission denied"),
        ("split", ".", 0o500, ".scratch: Permission denied"),
        ("train", ".scratch", 0o500, ".scratch/lock: Permission denied"),
    ],
)
def test_what_may_not_be_read_or_written_is_named_and_then_it_goes_on(
    project: Path, stage: str, path: str, mode: int, where: str
) -> None:
    shutil.rmtree(".scratch", ignore_errors=True)
    if path == ".scratch":
        Path(path).mkdir()
    Path(path).chmod(mode)
    try:
        code, message = run_stage(stage, heed_permissions)
    finally:
        Path(path).chmod(0o700)
    assert code == 1
    where = where.replace("…", "Detail: [errno 13] Permission denied")
    assert message == f"error: {where}; make it readable and writable for this user and run again"
    if stage == "split":
        assert run_stage(stage) == (0, "")
