"""Run Python commands in forks of a process that has imported torch, transformers and DVC.

A new process takes up to five seconds for these imports. The programs in `tests/bin` send commands to the server;
`tests.clone.run` does the same for `dvc`, without a process in between.

Signals act as on one process: `tests/bin/python` forwards those that it can, and the kernel kills a fork as soon as its
client is dead. The server has a single thread and does nothing else, so forking it is safe; forking a pytest worker is
not.
"""

import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile

PYTHON = Path(__file__).parent / "bin/python"
# Other values than in the pytest process, because results must not depend on them.
FORK_ENVIRONMENT = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
PRELOADED = (
    "accelerate",
    "datasets",
    "dvc.cli.parser",
    "dvc.repo.experiments.queue.celery",
    "dvc.repo.index",
    "dvc.repo.plots",
    "dvc.repo.stage",
    "dvc.rwlock",
    "hydra._internal.hydra",
    "networkx",
    "pandas",
    "peft",
    "pyarrow.parquet",
    "pydantic.main",
    "pygit2",
    "pyparsing",
    "rich.progress",
    "ruamel.yaml",
    "scmrepo.git",
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
)


def start_server(address: Path, owner: int) -> None:
    """Start a server at a Unix socket. It ends with the process `owner`."""
    # Arrow's allocator must start no thread.
    env = os.environ | FORK_ENVIRONMENT | {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(address), str(owner)], env=env, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


def run_forked(folder: Path, arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Exit code and output of `python ARGUMENTS` in a fork of the server."""
    request = json.dumps([list(arguments), str(folder), dict(env)]).encode()
    with (
        socket.socket(socket.AF_UNIX) as server,
        Path(os.devnull).open() as stdin,
        TemporaryFile("w+", encoding="utf-8") as stdout,
        TemporaryFile("w+", encoding="utf-8") as stderr,
    ):
        server.connect(env["FORK_SERVER"])
        streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
        socket.send_fds(server, [len(request).to_bytes(8, "big")], streams)
        server.sendall(request)
        server.recv(8)  # the fork's id
        code = int(server.recv(16) or 137)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def serve(address: str, owner: int) -> None:
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("transformers").AutoModelForCausalLM  # noqa: B018 (transformers imports it at this access)
    gc.freeze()  # the garbage collector of a fork would search the imported modules, and so copy their memory
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "only a process with one thread can be forked safely"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(1)
        print("ready", flush=True)
        while Path(f"/proc/{owner}").exists():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a server in the background ignores it
                length, streams, *_ = socket.recv_fds(connection, 8, 3)
                with connection.makefile("rb") as reader:
                    request = json.loads(reader.read(int.from_bytes(length, "big")))
                die_with_peer(connection)
                connection.sendall(os.getpid().to_bytes(8, "big"))
                connection.sendall(str(execute(*request, streams)).encode())
                os._exit(0)
            connection.close()


def die_with_peer(connection: socket.socket) -> None:
    """Get SIGKILL from the kernel when the other end of the connection is closed. The other end must send no more."""
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)


def execute(arguments: list[str], folder: str, env: dict[str, str], streams: list[int]) -> int:
    """Do what `python ARGUMENTS` does, for `-m MODULE`, `-c CODE` or a script. Returns the exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", buffering=1) for number in (1, 2))
    sys.dont_write_bytecode = True  # on a small disk, truncated bytecode would break all other tests
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.executable = str(PYTHON)  # what the command starts is forked, too
    option, *rest = arguments
    first = folder if option in ("-m", "-c") else str(Path(option).parent)
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = rest if option == "-m" else arguments
    code = 0
    try:
        redirect_dvc()
        if option == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif option == "-c":
            exec(rest[0], {"__name__": "__main__"})
        else:
            runpy.run_path(option, run_name="__main__")
    except SystemExit as ending:  # Python prints a text and exits with 1
        code = int(ending.code) if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def redirect_dvc() -> None:
    """DVC chose its streams when it was imported, before the fork."""
    import logging

    from colorama import initialise
    from dvc import logger

    initialise.orig_stdout, initialise.orig_stderr = sys.stdout, sys.stderr
    for name in ("dvc", "dvc_objects", "dvc_data"):
        logging.getLogger(name).handlers.clear()
    logger.setup()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
