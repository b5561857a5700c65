"""What a person sees when a stage fails: a message, an exit code, no traceback."""

import errno
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_main(body: str) -> subprocess.CompletedProcess[str]:
    code = "from stages.shared.errors import *\ndef main():\n" + textwrap.indent(body, "    ") + "\nrun(main)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_success_is_exit_code_0() -> None:
    result = run_main("print('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_a_users_mistake_is_its_message_and_exit_code_1() -> None:
    result = run_main("raise UserError('a.csv:3: found x; must be y; mend it')")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "error: a.csv:3: found x; must be y; mend it\n")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "error: data/x: No space left on device; free some space (`dvc gc --workspace` drops unused cache)",
        ),
        (errno.EACCES, "error: data/x: Permission denied; make it readable and writable for this user and run again"),
        (errno.EROFS, "error: data/x: Read-only file system; mount it writable and run again"),
    ],
)
def test_what_the_machine_refuses_is_said_with_advice(number: int, message: str) -> None:
    result = run_main(f"raise OSError({number}, os.strerror({number}), 'data/x')")
    assert result.returncode == 1
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr


def test_what_is_our_own_fault_keeps_its_traceback() -> None:
    result = run_main("raise KeyError('step')")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_stage_never_exits_0(number: int, code: int) -> None:
    result = run_main(f"os.kill(os.getpid(), {int(number)})\nimport time; time.sleep(5)")
    assert (result.returncode, result.stderr) == (code, "")


def test_a_full_disk_while_writing_parquet_is_said(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the same call fails, at the same place."""
    body = (
        "import resource, pyarrow as pa; from pathlib import Path; from stages.shared.files import parquet_writer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"with parquet_writer(Path({str(tmp_path / 'a.parquet')!r}), pa.schema([('a', pa.string())])) as writer:\n"
        "    writer.write([{'a': os.urandom(30).hex()} for _ in range(100_000)])"
    )
    result = run_main(body)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "raise the file size limit (`ulimit -f`) and run again" in result.stderr
    assert list(tmp_path.iterdir()) == []
