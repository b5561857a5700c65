"""Read the files of a commit, branch, experiment or the workspace from git, DVC's cache or its remote."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow.parquet as pq
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.fs import GitFileSystem
from dvc.repo import Repo
from dvc.scm import SCM, SCMError

from review.outdated import changed_model, differences
from stages.runtime.errors import UserError, describe_reason, user_errors
from stages.runtime.params import PARAMS_FILE
from stages.runtime.preflight import check_interpolated, check_owner
from stages.runtime.secrets import without_secrets
from stages.runtime.yaml12 import parse_yaml

WORKSPACE = "workspace"
T = TypeVar("T")


class Revision:
    """One side of a review. A file that is not available is not an error; `missing` has its path and the reason.

    Raises:
        UserError: git and DVC know no such revision.
    """

    def __init__(self, name: str):
        if not name.strip():
            raise UserError(f"BASE or REV is empty; must be a commit, branch, tag or experiment, or {WORKSPACE}")
        self.name = name
        self.missing: dict[str, str] = {}
        self._parsed: dict[str, dict[str, Any]] = {}
        try:
            self.repo = open_project(name)
            _ = self.repo.index.stages  # reads the pipeline
            self._files = DVCFileSystem(self.repo)
            return
        except DvcException as error:
            message = f"{name}: {error}; "
            if isinstance(error, SCMError):
                message += "must be a commit, branch or tag (`git branch --all`), an experiment (`dvc exp list`) or "
                branch = name.removeprefix("origin/")
                message += f"{WORKSPACE}; if this clone lacks it, `git fetch origin {branch}:{name}` gets a branch, "
                message += "and `git fetch --unshallow` the history"
            else:
                message += "a revision with conflict markers or other errors in its pipeline can't be reviewed; fix it"
        # Not inside `except`: the error would keep DVC's repository open until Python exits, and dulwich would warn.
        raise UserError(message)

    def outdated(self) -> list[str]:
        """The stages whose results do not belong to the code, parameters and data of this revision; with the reason."""
        lines = [*differences(self.repo)]
        return [*lines, *changed_model()] if self.name == WORKSPACE else lines

    def commit(self) -> str:
        """The hash of the commit; the name of the workspace."""
        return str(self.repo.fs.rev) if isinstance(self.repo.fs, GitFileSystem) else self.name

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if this revision does not have it or its content is not available."""
        return self._attempt(path, lambda: bytes(self._files.read_bytes(path)) if self._files.exists(path) else None)

    def read_json(self, path: str) -> dict[str, Any]:
        """A JSON object; empty if the file is not available or damaged."""
        return self._attempt(path, lambda: dict(json.loads(self.read(path) or b"{}"))) or {}

    def read_yaml(self, path: str) -> dict[str, Any]:
        """A YAML mapping, which is parsed once, because each part of a review reads `dvc.lock`."""
        if path not in self._parsed:
            with user_errors(f"{path} of {self.name}", "fix it"):
                self._parsed[path] = dict(parse_yaml(self.read(path) or b"{}") or {})
        return self._parsed[path]

    def read_table(self, path: str, columns: list[str] | None = None) -> pd.DataFrame | None:
        """A table, which may be a folder of shards; columns that it lacks have missing values."""

        def read() -> pd.DataFrame | None:
            shards = sorted(self._files.find(path)) if self._files.isdir(path) else [path]
            contents = [content for shard in shards if (content := self.read(shard)) is not None]
            if len(contents) < len(shards) or not shards:
                return None
            # Columns that a file lacks are ignored.
            tables = [pq.ParquetFile(io.BytesIO(content)).read(columns).to_pandas() for content in contents]
            table = pd.concat(tables, ignore_index=True)
            return table if columns is None else table.reindex(columns=columns)

        return self._attempt(path, read)

    def _attempt(self, path: str, read: Callable[[], T]) -> T | None:
        """Read a file, but not again if that failed. Errors come from DVC, the client of a remote, or a parser."""
        if path in self.missing:
            return None
        try:
            return read()
        except FileNotFoundError:
            has_remote = bool(self.repo.config["remote"])
            self.missing[path] = f"not in the cache{' or the remote' if has_remote else ', and there is no remote'}"
        except Exception as error:
            self.missing[path] = without_secrets(describe_reason(error))
        return None

    def metrics_files(self) -> list[str]:
        """The JSON files in metrics/ of this revision."""
        return sorted(path for path in self._files.find("metrics") if path.endswith(".json"))


def open_project(name: str) -> Repo:
    """The DVC project of the working directory, in the workspace or a revision; it can be in a subfolder of git.

    Raises:
        UserError: a parameter can't be inserted into `dvc.yaml`, or the repository belongs to another user.
    """
    check_owner()
    root = Path(Repo.find_root())
    if name == WORKSPACE:
        repo = Repo()
    else:
        git = SCM(str(root))
        folder = root.relative_to(git.root_dir).as_posix()
        files = GitFileSystem(scm=git, rev=name)
        repo = Repo(f"/{folder}".removesuffix("."), fs=files, scm=git, uninitialized=True)  # it can be older than DVC
    params = repo.fs.join(repo.root_dir, PARAMS_FILE.name)
    if repo.fs.exists(params):
        with repo.fs.open(params, "rb") as file:
            check_interpolated(file.read(), f"{PARAMS_FILE} of {name}")
    return repo


def hashes(entries: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The MD5 of each dependency or output in a list of `dvc.lock`; empty if it has none."""
    return {entry["path"]: entry.get("md5", "") for entry in entries}


def output_hashes(lock: Mapping[str, Any]) -> dict[str, str]:
    """The MD5 of each output in a `dvc.lock` file."""
    stages = (lock.get("stages") or {}).values()
    return {path: md5 for stage in stages for path, md5 in hashes(stage.get("outs", [])).items()}
