"""Read the files of a commit, branch, experiment or the workspace from git, DVC's cache or its remote."""

import io
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.scm import SCMError

from stages.runtime.errors import UserError, user_errors
from stages.runtime.yaml12 import parse_yaml

WORKSPACE = "workspace"


class Revision:
    """One side of a review. Files that are not available are not an error; they are listed in `missing`.

    Raises:
        UserError: git and DVC know no such revision.
    """

    def __init__(self, name: str):
        if not name.strip():
            raise UserError(f"BASE or REV is empty; must be a commit, branch, tag or experiment, or {WORKSPACE}")
        self.name = name
        self.missing: list[str] = []
        try:
            self._files = DVCFileSystem(rev=None if name == WORKSPACE else name)
            _ = self._files.repo.index.data  # resolves the revision and reads its pipeline, at the first access
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

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if this revision does not have it or its content is not available."""
        if not self._files.exists(path):
            return None
        try:
            content: bytes = self._files.read_bytes(path)
        except (OSError, DvcException):
            self.missing.append(path)
            return None
        return content

    def read_json(self, path: str) -> dict[str, Any]:
        with self.user_errors(path):
            return dict(json.loads(self.read(path) or b"{}"))

    def read_yaml(self, path: str) -> dict[str, Any]:
        with self.user_errors(path):
            return dict(parse_yaml(self.read(path) or b"{}"))

    def read_table(self, path: str, columns: list[str] | None = None) -> pd.DataFrame | None:
        """A table, which may be a folder of shards; columns that it lacks have missing values."""
        with self.user_errors(path):
            is_folder = self._files.isdir(path)
            shards = sorted(self._files.find(path)) if is_folder else [path]
            if not shards:  # the content of the folder is not available
                self.missing.append(path)
                return None
            tables = []
            for shard in shards:
                if (content := self.read(shard)) is None:
                    return None
                file = pq.ParquetFile(io.BytesIO(content))
                names = columns and [name for name in columns if name in file.schema_arrow.names]
                tables.append(file.read(names).to_pandas())
            table = pd.concat(tables, ignore_index=True)
            return table if columns is None else table.reindex(columns=columns)

    def user_errors(self, path: str) -> AbstractContextManager[None]:
        return user_errors(f"{path} of {self.name}", "`dvc repro` in a checkout of that revision writes it again")

    def metrics_files(self) -> list[str]:
        """The JSON files in metrics/ of this revision."""
        return sorted(path for path in self._files.find("metrics") if path.endswith(".json"))


def hashes(entries: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The MD5 of each dependency or output in a list of `dvc.lock`; empty if it has none."""
    return {entry["path"]: entry.get("md5", "") for entry in entries}


def output_hashes(lock: Mapping[str, Any]) -> dict[str, str]:
    """The MD5 of each output in a `dvc.lock` file."""
    stages = (lock.get("stages") or {}).values()
    return {path: md5 for stage in stages for path, md5 in hashes(stage.get("outs", [])).items()}
