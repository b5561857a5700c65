"""How a stage ends: with an exit code, and with a message instead of a traceback; one stage per folder at a time."""

import errno
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.clone import ROOT
from tests.fork_server import run_forked

pytestmark = [pytest.mark.subprocess, pytest.mark.usefixtures("fast_stages")]


def run_main(folder: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a stage with this body in a fork, or in a new process if it needs environment variables of its own."""
    (folder / "params.yaml").touch()
    code = (
        "import os, sys; sys.argv = ['/x/stages/train.py']\n"
        "from stages.runtime.errors import UserError; from stages.runtime.run import run\n"
        "def main():\n" + textwrap.indent(body, "    ") + "\nrun(main)"
    )
    # No bytecode: a process with a limited file size would truncate files that other tests use at the same time.
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    if not environment:
        return run_forked(folder, ["-c", code], env | {"FORK_SERVER": os.environ["FORK_SERVER"]})
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env)


def test_success_exits_with_0_and_characters_that_the_terminal_lacks_become_escapes(tmp_path: Path) -> None:
    result = run_main(tmp_path, r"print('a \u2192 b')", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "a \\u2192 b\n", "")


def test_bug_keeps_its_traceback(tmp_path: Path) -> None:
    result = run_main(tmp_path, "raise KeyError('step')")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("interrupted", ["interrupt()", "InDestructor()"])
def test_interrupted_stage_never_exits_with_0(tmp_path: Path, number: int, code: int, interrupted: str) -> None:
    body = f"""
import time
def interrupt(*_):
    os.kill(os.getpid(), {int(number)})
    time.sleep(5)
class InDestructor:
    __del__ = interrupt
{interrupted}
time.sleep(5)
"""
    result = run_main(tmp_path, body)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


OUT_OF_MEMORY = (
    "out of memory; lower batch_size (memory of activations grows with batch_size * max_length) or max_length, set "
    "activation_checkpointing: on (keeps one activation per layer), optimizer: adamw_8bit (a quarter of its state) or "
    "finetuning: lora (no gradients and optimizer state for the base weights), or free some memory, and run again"
)
NO_SPACE = "No space left on device; free some space (docs/reliability.md, Disk) and run again"
NO_PERMISSION = "Permission denied; make it readable and writable for this user and run again"
NO_FILE = "No such file or directory; run `dvc repro` in the project's folder, which creates the inputs of a stage"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise UserError('a.csv:3: found x; must be y; fix it')", "a.csv:3: found x; must be y; fix it"),
        (r"raise UserError('found column \x1b]0;owned\x07\u202e')", r"found column \x1b]0;owned\x07\u202e"),
        (f"raise OSError({errno.ENOSPC}, 'No space left on device', 'data/x')", f"data/x: {NO_SPACE}"),
        ("raise Exception('I/O error: No space left on device (os error 28)')", NO_SPACE),
        (f"raise OSError({errno.EACCES}, 'Permission denied', 'data/x')", f"data/x: {NO_PERMISSION}"),
        (f"raise OSError({errno.EROFS}, 'Read-only', 'data/x')", "data/x: Read-only; mount it writable and run again"),
        ("open('data/raw.parquet')", f"data/raw.parquet: {NO_FILE}"),
        ("raise MemoryError", OUT_OF_MEMORY),
        ("import torch; torch.empty(2**50)", OUT_OF_MEMORY),
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", OUT_OF_MEMORY),
    ],
)
def test_an_error_that_the_user_can_fix_is_a_message_with_advice(tmp_path: Path, body: str, message: str) -> None:
    result = run_main(tmp_path, body)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"error: {message}\n")


def test_truncated_bytecode_is_deleted_after_a_full_disk(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    intact = py_compile.compile(str(tmp_path / "stages/split.py"))
    truncated = tmp_path / "stages/__pycache__/format.cpython-311.pyc"
    assert intact
    truncated.write_bytes(Path(intact).read_bytes()[:-100])
    run_main(tmp_path, f"raise OSError({errno.ENOSPC}, 'full')", PYTHONPATH=str(tmp_path))
    assert Path(intact).exists()
    assert not truncated.exists()


def test_messages_and_summaries_have_no_secret_of_the_environment(tmp_path: Path) -> None:
    body = (
        "from stages.runtime.terminal import summary\n"
        "mirror, token = os.environ['HF_ENDPOINT'], os.environ['HF_TOKEN']\n"
        "summary({'uploaded': f'to {mirror}/a/b'}, [], then=f'open {mirror}')\n"
        "raise UserError(f'the connection to the Hub at {mirror} failed with {token}')"
    )
    secrets = {"HF_ENDPOINT": "http://me:SECRET@mirror.example", "HF_TOKEN": "hf_12345678"}
    result = run_main(tmp_path, body, **secrets)
    assert result.stdout == "  uploaded  to http://***@mirror.example/a/b\n  next      open http://***@mirror.example\n"
    assert result.stderr == "error: the connection to the Hub at http://***@mirror.example failed with ***\n"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("HF_ENDPOINT", "http://[bad", "Invalid IPv6 URL"),
        ("HF_ENDPOINT", "https://hub:port", "Port could not be cast to integer value as 'port'"),
        ("HF_HUB_ETAG_TIMEOUT", "ten", "invalid literal for int() with base 10: 'ten'"),
    ],
)
def test_a_variable_with_which_the_hub_client_can_not_be_imported_is_named(
    tmp_path: Path, name: str, value: str, reason: str
) -> None:
    result = run_main(tmp_path, "from huggingface_hub import HfApi", **{name: value})
    message = f"error: the Hub client can't be imported: {reason}; correct or unset one of its variables: {name}"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, message)


def test_second_stage_in_the_same_folder_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").touch()
    code = (
        "import sys, time; sys.argv = ['/x/stages/evaluate.py', 'base']\n"
        "from stages.runtime.run import run\nrun(lambda: print('locked', flush=True) or time.sleep(60))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        second = run_main(tmp_path, "print('ran')")
        assert (second.returncode, second.stdout, second.stderr) == (
            1,
            "",
            f"error: .scratch/lock: held by process {first.pid}, which runs evaluate base in this folder; "
            "wait for it, or end it with `kill`\n",
        )
        first.kill()
    assert run_main(tmp_path, "print('ran')").stdout == "ran\n"


@pytest.mark.parametrize("module", ["stages.train", "review", "tools.vote", "tools.publish", "tools.clean"])
def test_commands_outside_the_folder_of_the_project_are_refused(tmp_path: Path, module: str) -> None:
    result = run_forked(tmp_path, ["-m", module], {**os.environ, "PYTHONPATH": str(ROOT)})
    message = "error: params.yaml: not found; run in the project's folder\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", message)
    assert [*tmp_path.iterdir()] == []
