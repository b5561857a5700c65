"""Resumable checkpoints of a run, kept outside the declared outputs: DVC deletes those before a stage runs."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from stages.shared.errors import UserError, reading
from stages.shared.files import atomic_path, file_sha256, remove, write_json
from stages.shared.locks import held

KEPT = 2  # checkpoints on disk: should the newest be damaged, there is one before it
TENSORS, STATE, BEST, CHECKSUMS = "tensors.safetensors", "state.json", "best.safetensors", "sha256.json"


def fingerprint(stage: str, params: dict[str, Any], environment: dict[str, str]) -> str:
    """What a run depends on: parameters, versions and device, and every file that `dvc.yaml` declares."""
    with reading(Path("dvc.yaml"), "bring it back with `git checkout dvc.yaml`"):
        deps = YAML(typ="safe").load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    digest = hashlib.sha256(json.dumps([params, environment], sort_keys=True).encode())
    for dep in map(Path, deps):
        for path in sorted(file for file in dep.rglob("*") if file.is_file()) if dep.is_dir() else [dep]:
            digest.update(f"\0{path}\0{file_sha256(path)}".encode())
    return digest.hexdigest()[:16]


class Checkpoints:
    """The checkpoints of one run, in `.scratch/<stage>/<fingerprint>/`.

    A checkpoint is a folder that appears whole by a rename: tensors, JSON-able state, the best weights until then, and
    the checksums of these. A run that has the same fingerprint goes on from the newest; every other starts anew.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    @contextmanager
    def opened(cls, stage: str, params: dict[str, Any], environment: dict[str, str]) -> Iterator["Checkpoints"]:
        """Hold the run's folder, which stays for the next try when the block fails.

        When it succeeds the newest checkpoint stays all the same, until another run starts: DVC may yet be killed
        before it has taken over the outputs.

        Raises:
            UserError: another process trains the same run.
        """
        # In `dvc exp run --temp` the stage runs in a copy; DVC_ROOT is where that was copied from.
        runs = Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / stage
        folder = runs / fingerprint(stage, params, environment)
        with held(folder.with_suffix(".lock"), "runs this very training"):
            for finished in runs.glob("*/finished"):
                if finished.parent != folder:
                    with suppress(UserError), held(finished.parent.with_suffix(".lock"), "deletes this training"):
                        shutil.rmtree(finished.parent)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "finished").unlink(missing_ok=True)
            checkpoints = cls(folder)
            yield checkpoints
            checkpoints.keep_newest(1)
            remove(folder / BEST)
            (folder / "finished").touch()

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Keep tensors and JSON-able state as the checkpoint of an optimizer step; at most `KEPT` lie on the disk."""
        self.keep_newest(KEPT - 1)
        with atomic_path(self.folder / f"step-{step:08}", durable=True) as partial:
            partial.mkdir()
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
            write_json(partial / STATE, state)
            if (self.folder / BEST).exists():
                link(self.folder / BEST, partial / BEST)
            write_json(partial / CHECKSUMS, {path.name: file_sha256(path) for path in sorted(partial.iterdir())})

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, None where there is none. Damaged ones are deleted, with a message."""
        for folder in reversed(self._steps()):
            if damage := find_damage(folder):
                print(f"{folder}: this checkpoint is damaged ({damage}): trying the one before it", flush=True)
                shutil.rmtree(folder)
                continue
            remove(self.folder / BEST)
            if (folder / BEST).exists():
                link(folder / BEST, self.folder / BEST)
            return folder
        return None

    def save_best(self, parameters: dict[str, torch.Tensor]) -> None:
        """Keep the parameters that have the lowest validation loss so far."""
        with atomic_path(self.folder / BEST) as partial:
            save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, partial)

    def load_best(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / BEST)

    def keep_newest(self, count: int) -> None:
        for old in self._steps()[:-count]:
            shutil.rmtree(old)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint. Tensors come from the disk as they are looked at, and are shared."""
    return load_file(folder / TENSORS), json.loads((folder / STATE).read_text(encoding="utf-8"))


def find_damage(folder: Path) -> str | None:
    """What a checkpoint lacks of what was written, None where it is whole."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, checksum in checksums.items():
            if file_sha256(folder / name) != checksum:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} is not what was written"
    return None


def link(source: Path, target: Path) -> None:
    """A second name for a file, which costs no space; a copy where the file system has no such thing."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
