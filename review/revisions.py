"""Read the files of a commit, branch, experiment or the workspace from git, DVC's cache or its remote."""

import io
import json
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException

from stages.runtime.errors import UserError, user_errors
from stages.runtime.yaml12 import parse_yaml

WORKSPACE = "workspace"


class Revision:
    """One side of a review. Files that are not available are not an error; they are listed in `missing`.

    Raises:
        UserError: git and DVC know no such revision.
    """

    def __init__(self, name: str):
        self.name = name
        self.missing: list[str] = []
        try:
            self._files = DVCFileSystem(rev=None if name == WORKSPACE else name)
            _ = self._files.repo  # resolves the revision, at the first access
            return
        except DvcException as error:
            reason = str(error)
        # Not inside `except`: the error would keep DVC's repository open until Python exits, and dulwich would warn.
        raise UserError(
            f"{name}: {reason}; must be a commit, branch or tag (`git branch --all`), an experiment (`dvc exp list`) "
            f"or {WORKSPACE}"
        )

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
        with self._user_errors(path):
            return dict(json.loads(self.read(path) or b"{}"))

    def read_yaml(self, path: str) -> dict[str, Any]:
        with self._user_errors(path):
            return dict(parse_yaml(self.read(path) or b"{}"))

    def read_table(self, path: str, columns: list[str] | None = None) -> pd.DataFrame | None:
        content = self.read(path)
        with self._user_errors(path):
            return None if content is None else pd.read_parquet(io.BytesIO(content), columns=columns)

    def _user_errors(self, path: str) -> AbstractContextManager[None]:
        return user_errors(f"{path} of {self.name}", "`dvc repro` in a checkout of that revision writes it again")

    def metrics_files(self) -> list[str]:
        """The JSON files in metrics/ of this revision."""
        return sorted(path for path in self._files.find("metrics") if path.endswith(".json"))
