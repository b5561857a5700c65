"""How a stage ends: alone in its folder, with a message, an exit code and no traceback."""

import errno
import py_compile
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_main(folder: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import os, sys; sys.argv = ['/x/stages/train.py']\n"
        "from stages.shared.errors import UserError; from stages.shared.run import run\n"
        "def main():\n" + textwrap.indent(body, "    ") + "\nrun(main)"
    )
    # No byte code: a process with a small disk would leave it cut off for the tests that run beside it.
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env)


def test_success_is_exit_code_0(tmp_path: Path) -> None:
    result = run_main(tmp_path, "print('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_a_users_mistake_is_its_message_and_exit_code_1(tmp_path: Path) -> None:
    result = run_main(tmp_path, "raise UserError('a.csv:3: found x; must be y; mend it')")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: a.csv:3: found x; must be y; mend it\n")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "error: data/x: No space left on device; free some space (README, Disk) and run again\n",
        ),
        (errno.EACCES, "error: data/x: Permission denied; make it readable and writable for this user and run again"),
        (errno.EROFS, "error: data/x: Read-only file system; mount it writable and run again"),
    ],
)
def test_what_the_machine_refuses_is_said_with_advice(tmp_path: Path, number: int, message: str) -> None:
    result = run_main(tmp_path, f"raise OSError({number}, os.strerror({number}), 'data/x')")
    assert result.returncode == 1
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr


def test_what_is_our_own_fault_keeps_its_traceback(tmp_path: Path) -> None:
    result = run_main(tmp_path, "raise KeyError('step')")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_stage_never_exits_0(tmp_path: Path, number: int, code: int) -> None:
    # Where tests run in the background, a shell may have told them to ignore Ctrl-C.
    body = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    result = run_main(tmp_path, body + f"os.kill(os.getpid(), {int(number)})\ntime.sleep(5)")
    assert (result.returncode, result.stderr) == (code, "")


def test_a_full_disk_while_writing_parquet_is_said(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the same call fails, at the same place."""
    body = (
        "import resource, signal, pyarrow as pa\n"
        "from pathlib import Path; from stages.shared.files import parquet_writer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"with parquet_writer(Path({str(tmp_path / 'a.parquet')!r}), pa.schema([('a', pa.string())])) as writer:\n"
        "    writer.write([{'a': os.urandom(30).hex()} for _ in range(100_000)])"
    )
    result = run_main(tmp_path, body)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "raise the file size limit (`ulimit -f`) and run again" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".scratch"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise MemoryError", "out of memory; lower batch_size or max_length, or free some memory, and run again"),
        (
            "import torch; torch.empty(2**50)",
            "out of memory; lower batch_size or max_length, or free some memory, and run again",
        ),
        (
            "raise Exception('I/O error: No space left on device (os error 28)')",
            "No space left on device; free some space (README, Disk) and run again",
        ),
        (
            "open('data/raw.parquet')",
            "data/raw.parquet: No such file or directory; "
            "run `dvc repro` in the project's folder, which makes what a stage reads",
        ),
    ],
)
def test_what_the_libraries_say_in_their_own_ways(tmp_path: Path, body: str, message: str) -> None:
    result = run_main(tmp_path, body)
    assert (result.returncode, result.stderr) == (1, f"error: {message}\n")


def test_safetensors_full_disk_is_said(tmp_path: Path) -> None:
    body = (
        "import resource, signal, torch; from safetensors.torch import save_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "save_file({'w': torch.zeros(10_000)}, 'w.safetensors')"
    )
    result = run_main(tmp_path, body)
    expected = "error: File too large; raise the file size limit (`ulimit -f`) and run again\n"
    assert (result.returncode, result.stderr) == (1, expected)


def test_byte_code_that_a_full_disk_cut_off_is_deleted(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    whole = py_compile.compile(str(tmp_path / "stages/split.py"))
    cut = tmp_path / "stages/__pycache__/format.cpython-311.pyc"
    assert whole
    cut.write_bytes(Path(whole).read_bytes()[:-100])
    run_main(tmp_path, f"raise OSError({errno.ENOSPC}, 'full')", PYTHONPATH=str(tmp_path))
    assert Path(whole).exists()
    assert not cut.exists()


def test_text_of_the_data_can_not_steer_the_terminal(tmp_path: Path) -> None:
    result = run_main(tmp_path, r"raise UserError('found column \x1b]0;owned\x07\u202e')")
    assert result.stderr == "error: found column \\x1b]0;owned\\x07\\u202e\n"


def test_an_arrow_does_not_end_a_run_where_the_terminal_has_none(tmp_path: Path) -> None:
    result = run_main(tmp_path, r"print('a \u2192 b')", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "a \\u2192 b\n", "")


def test_a_second_stage_in_the_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.argv = ['/x/stages/evaluate.py', 'base']\n"
        "from stages.shared.run import run\nrun(lambda: print('held', flush=True) or time.sleep(60))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = run_main(tmp_path, "print('ran')")
        assert (second.returncode, second.stdout, second.stderr) == (
            1,
            "",
            f"error: .scratch/lock: held by process {first.pid}, which runs evaluate base in this folder; "
            "wait for it, or end it with `kill`\n",
        )
        first.kill()
    assert run_main(tmp_path, "print('ran')").stdout == "ran\n"
