"""Errors of the operating system: a message, no partial output, and the next run succeeds when the cause is gone."""

import ctypes
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from tests.clone import ROOT, edit
from tests.fork_server import run_forked

pytestmark = [pytest.mark.subprocess, pytest.mark.usefixtures("fast_stages")]

OUTPUTS = {
    "download_dataset": ["data/raw.parquet", "data/unreadable.parquet", "data/source.json"],
    "download_model": ["models/base", "models/tokenizer"],
    "format": ["data/formatted.parquet", "data/rejected.parquet", "metrics/format.json", "metrics/lengths.csv"],
    "split": ["data/train.parquet", "data/validation.parquet", "data/test.parquet", "metrics/split.json"],
    "train": ["models/tuned", "metrics/train.json", "metrics/curve.csv"],
    "predict": ["data/answers/base.parquet"],
    "generate": ["metrics/samples/base.md"],
}


@pytest.fixture
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which any stage can run."""
    shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    edit(tmp_path / "project", max_new_tokens="4")
    return tmp_path / "project"


def run_stage(stage: str, before: str = "") -> tuple[int, str]:
    """Exit code and last line of standard error of a stage in a process in which a function of this file was called."""
    code = f"""
import sys
from stages import {stage}
from stages.runtime.run import run
from tests import test_environment
sys.argv = [{stage!r}, "base"]
{f"test_environment.{before}()" if before else ""}
run({stage}.main)
"""
    result = run_forked(Path.cwd(), ["-c", code], {**os.environ, "PYTHONPATH": str(ROOT)})
    return result.returncode, result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""


def small_disk() -> None:
    """Limit files to 200 bytes, so that the same calls fail as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))


def heed_permissions() -> None:
    """Drop the capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root ignores permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # of the effective set
    assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_full_disk_gives_a_message_and_no_partial_output(project: Path, stage: str) -> None:
    for output in OUTPUTS[stage]:
        shutil.rmtree(output) if Path(output).is_dir() else Path(output).unlink(missing_ok=True)
    code, message = run_stage(stage, "small_disk")
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
        ("train", ".scratch", 0o500, "{project}/.scratch/lock: Permission denied"),
    ],
)
def test_a_file_without_permission_is_named(project: Path, stage: str, path: str, mode: int, where: str) -> None:
    shutil.rmtree(".scratch", ignore_errors=True)
    if path == ".scratch":
        Path(path).mkdir()
    Path(path).chmod(mode)
    try:
        code, message = run_stage(stage, "heed_permissions")
    finally:
        Path(path).chmod(0o700)
    assert code == 1
    where = where.replace("…", "Detail: [errno 13] Permission denied").replace("{project}", str(project))
    assert message == f"error: {where}; make it readable and writable for this user and run again"
    if stage == "split":
        assert run_stage(stage) == (0, "")
