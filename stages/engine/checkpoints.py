"""Resumable checkpoints of a run, kept outside the declared outputs, which DVC deletes before it runs a stage."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.data.files import atomic_path, file_sha256, read_json, remove, write_json
from stages.runtime.errors import UserError, user_errors
from stages.runtime.locks import file_lock
from stages.runtime.yaml12 import parse_yaml
from stages.text import printable

SAVE_TOTAL_LIMIT = 2  # so that there is another checkpoint if the newest is damaged
TENSORS, STATE, BEST, CHECKSUMS = "tensors.safetensors", "state.json", "best.safetensors", "sha256.json"
RUN = "run.json"  # in the folder of a run: what its fingerprint is made from
MAX_LISTED = 3  # differences between runs


def describe_run(stage: str, params: dict[str, Any], environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Everything that a run depends on: parameters, environment, and hashes of the files that `dvc.yaml` declares."""
    with user_errors(Path("dvc.yaml"), "restore it with `git checkout dvc.yaml`"):
        deps = parse_yaml(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    files = [
        path
        for dep in map(Path, deps)
        for path in (sorted(path for path in dep.rglob("*") if path.is_file()) if dep.is_dir() else [dep])
        if "__pycache__" not in path.parts
    ]
    hashes = {str(path): file_sha256(path) for path in files}
    return {"parameters": params, "environment": environment, "files": hashes}


def fingerprint(description: dict[str, dict[str, Any]]) -> str:
    """A hash of what `describe_run` returned."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    """How the first of two runs differs from the second: parameters, then environment, then files."""
    changes = []
    for kind, old in before.items():
        new = after.get(kind, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                values = [
                    value if isinstance(value, str) else json.dumps(value) for value in (old.get(name), new.get(name))
                ]
                changes.append(f"another {name}" if kind == "files" else f"{name}: {values[0]} (now {values[1]})")
    return changes


class Checkpoints:
    """The checkpoints of one run, in `.scratch/<stage>/<fingerprint>/`.

    A checkpoint is a folder that is renamed into place when complete. It has tensors, state as JSON, the best weights
    so far, and their checksums. A run with the same fingerprint resumes from the newest one; any other run starts from
    the beginning.

    Args:
        folder: the folder of the run.
        read_only: save nothing. True on all ranks except the main process.
    """

    def __init__(self, folder: Path, read_only: bool = False):
        self.folder = folder
        self.read_only = read_only

    @classmethod
    @contextmanager
    def open_run(cls, stage: str, params: dict[str, Any], environment: dict[str, str]) -> Iterator["Checkpoints"]:
        """Lock the folder of the run. If the block fails, the folder is kept for the next attempt.

        If another process runs the same training, wait for it; this run then resumes from its last checkpoint.

        If it succeeds, the newest checkpoint is kept until another run starts, because DVC can still be killed before
        it has recorded the outputs.
        """
        # In `dvc exp run --temp` the stage runs in a copy; DVC_ROOT is the original folder.
        runs = Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / stage
        description = describe_run(stage, params, environment)
        folder = runs / fingerprint(description)
        with file_lock(folder.with_suffix(".lock"), "runs the same training", wait=True):
            for finished in runs.glob("*/finished"):  # markers of finished runs, in their folders
                if finished.parent != folder:
                    with suppress(UserError), file_lock(finished.parent.with_suffix(".lock"), "deletes this training"):
                        shutil.rmtree(finished.parent)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "finished").unlink(missing_ok=True)
            write_json(folder / RUN, description)
            checkpoints = cls(folder)
            if not checkpoints._steps():
                checkpoints._report_another_run(description)
            yield checkpoints
            checkpoints.keep_newest(1)
            remove(folder / BEST)
            (folder / "finished").touch()

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Save the checkpoint of an optimizer step; at most `SAVE_TOTAL_LIMIT` are kept.

        Args:
            state: must be serializable as JSON.
        """
        if self.read_only:
            return
        self.keep_newest(SAVE_TOTAL_LIMIT - 1)
        with atomic_path(self.folder / f"step-{step:08}", durable=True) as partial:
            partial.mkdir()
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
            write_json(partial / STATE, state)
            if (self.folder / BEST).exists():
                link_or_copy(self.folder / BEST, partial / BEST)
            write_json(partial / CHECKSUMS, {path.name: file_sha256(path) for path in sorted(partial.iterdir())})

    def restore_newest(self) -> Path | None:
        """The newest intact checkpoint, or None. Damaged ones are deleted with a message.

        Also restores the best weights as of that checkpoint, for `load_best`.
        """
        for folder in reversed(self._steps()):
            if damage := verify_checksums(folder):
                print(f"{folder}: this checkpoint is damaged ({damage}); trying the one before it", flush=True)
                shutil.rmtree(folder)
                continue
            remove(self.folder / BEST)
            if (folder / BEST).exists():
                link_or_copy(folder / BEST, self.folder / BEST)
            return folder
        return None

    def save_best(self, weights: dict[str, torch.Tensor]) -> None:
        """Save the weights with the lowest validation loss so far."""
        if self.read_only:
            return
        with atomic_path(self.folder / BEST) as partial:
            save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, partial)

    def load_best(self) -> dict[str, torch.Tensor]:
        """Load the weights from the last `save_best`."""
        return load_file(self.folder / BEST)

    def keep_newest(self, count: int) -> None:
        """Delete all checkpoints except the newest ones."""
        for old in self._steps()[:-count]:
            shutil.rmtree(old)

    def _report_another_run(self, description: dict[str, dict[str, Any]]) -> None:
        """Print how the interrupted run with the newest checkpoint differs from this run, if there is one."""
        others = [step for step in self.folder.parent.glob("*/step-*") if not (step.parent / "finished").exists()]
        if not others:
            return
        # Not if that run continues in another process, or if an older version of this code has started it.
        with suppress(UserError, OSError):
            newest = max(others, key=lambda step: step.stat().st_mtime)
            with file_lock(newest.parent.with_suffix(".lock"), "reads about this training"):
                changes = differences(read_json(newest.parent / RUN), description)
            more = f" and {len(changes) - MAX_LISTED} more" if len(changes) > MAX_LISTED else ""
            step = int(newest.name.removeprefix("step-"))
            listed = ", ".join(changes[:MAX_LISTED])
            line = f"Starting from the beginning: the checkpoint at step {step:,} is of a run with {listed}{more}"
            print(printable(line), flush=True)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. Tensors are memory-mapped."""
    return load_file(folder / TENSORS), read_json(folder / STATE)


def verify_checksums(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is intact."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, checksum in checksums.items():
            if file_sha256(folder / name) != checksum:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is not valid"
    return None


def link_or_copy(source: Path, target: Path) -> None:
    """Create a hard link, which takes no space, or a copy if the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
