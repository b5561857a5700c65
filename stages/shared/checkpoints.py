"""Resumable checkpoints of a run, kept outside the declared outputs: DVC deletes those before a stage runs."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from stages.shared.errors import UserError
from stages.shared.files import atomic_path, write_json

KEPT = 2  # checkpoints on disk: should the newest be damaged, there is one before it


def fingerprint(stage: str, params: dict[str, Any]) -> str:
    """What a run depends on: parameters, the versions of torch and CUDA, and every file that `dvc.yaml` declares."""
    deps = YAML(typ="safe").load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    digest = hashlib.sha256(json.dumps([params, torch.__version__], sort_keys=True).encode())
    for dep in map(Path, deps):
        for path in sorted(file for file in dep.rglob("*") if file.is_file()) if dep.is_dir() else [dep]:
            digest.update(f"\0{path}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one run, in `.scratch/<stage>/<fingerprint>/`.

    A checkpoint is a folder of safetensors and JSON that appears whole by a rename. A run that has the same fingerprint
    goes on from the newest; every other starts anew.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    @contextmanager
    def opened(cls, stage: str, params: dict[str, Any]) -> Iterator["Checkpoints"]:
        """Hold the run's folder; it is deleted when the block succeeds and kept for the next try when it fails.

        Raises:
            UserError: another process trains the same run.
        """
        # In `dvc exp run --temp` the stage runs in a copy; DVC_ROOT is where that was copied from.
        root = Path(os.environ.get("DVC_ROOT", "."))
        folder = root / ".scratch" / stage / fingerprint(stage, params)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise UserError(
                    f"{folder}: process {lock.read().strip()} runs this very training; wait for it, or end it with kill"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield cls(folder)
            shutil.rmtree(folder)

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Keep tensors and JSON-able state as the checkpoint of an optimizer step; drop all but the newest `KEPT`."""
        with atomic_path(self.folder / f"step-{step:08}") as partial:
            partial.mkdir()
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "tensors.safetensors")
            write_json(partial / "state.json", state)
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(old)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest checkpoint, or None where there is none."""
        if not (steps := self._steps()):
            return None
        state: dict[str, Any] = json.loads((steps[-1] / "state.json").read_text(encoding="utf-8"))
        return load_file(steps[-1] / "tensors.safetensors"), state

    def save_best(self, parameters: dict[str, torch.Tensor]) -> None:
        """Keep the parameters that have the lowest validation loss so far."""
        with atomic_path(self.folder / "best.safetensors") as partial:
            save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, partial)

    def load_best(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "best.safetensors")

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
