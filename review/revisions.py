"""The files of a commit, a branch, an experiment or the workspace: from git, DVC's cache or its remote."""

import io
import json
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from ruamel.yaml import YAML

from stages.shared.errors import UserError, reading

WORKSPACE = "workspace"


class Revision:
    """One side of a review. What it can't get is not an error: `missing` says what, for the reader.

    Raises:
        UserError: git and DVC know no such revision.
    """

    def __init__(self, name: str):
        self.name = name
        self.missing: list[str] = []
        try:
            self._files = DVCFileSystem(rev=None if name == WORKSPACE else name)
            _ = self._files.repo  # it looks for the revision at first use
            return
        except DvcException as error:
            reason = str(error)
        # Not inside `except`: the error would keep DVC's repository open until Python ends, which dulwich complains of.
        raise UserError(
            f"{name}: {reason}; must be a commit, branch or tag (`git branch --all`), an experiment (`dvc exp list`) "
            f"or {WORKSPACE}"
        )

    def read(self, path: str) -> bytes | None:
        """A file's content; None where this revision has no such file, or its content can't be had here."""
        if not self._files.exists(path):
            return None
        try:
            content: bytes = self._files.read_bytes(path)
        except (OSError, DvcException):
            self.missing.append(path)
            return None
        return content

    def read_json(self, path: str) -> dict[str, Any]:
        with self._reading(path):
            return dict(json.loads(self.read(path) or b"{}"))

    def read_yaml(self, path: str) -> dict[str, Any]:
        with self._reading(path):
            return dict(YAML(typ="safe").load(self.read(path) or b"{}"))

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table | None:
        content = self.read(path)
        with self._reading(path):
            return None if content is None else pq.read_table(io.BytesIO(content), columns=columns)

    def _reading(self, path: str) -> AbstractContextManager[None]:
        return reading(f"{path} of {self.name}", "`dvc repro` in a checkout of that revision makes it again")

    def metrics_files(self) -> list[str]:
        """The JSON files under metrics/ that this revision has."""
        return sorted(path for path in self._files.find("metrics") if path.endswith(".json"))
