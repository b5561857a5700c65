"""Check what DVC can't report well, or only after stages have run. `make` runs it before `dvc repro`.

DVC inserts parameters into `dvc.yaml` before the stage `check_params` can check them, and it meets a repository of
another user only when all stages have run.
"""

import os
import subprocess
from pathlib import Path

from stages.runtime.errors import UserError
from stages.runtime.param_errors import INSTEAD_OF_NULL, parse_params, raise_problems
from stages.runtime.params import TrainParams, find_problems, load_params
from stages.runtime.run import run


def check_project() -> None:
    """Check the working directory, the owner of its repository, and all parameters.

    Raises:
        UserError: git refuses to read the repository, or a parameter is invalid.
    """
    check_owner()
    load_params(TrainParams)  # reports mistakes in the whole file


def check_owner() -> None:
    """Check that git accepts the owner of the repository, if there is one.

    Raises:
        UserError: it belongs to another user, as in a container, and is not listed in safe.directory.
    """
    command, english = ["git", "rev-parse", "--git-dir"], {**os.environ, "LC_ALL": "C"}
    try:
        git = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=english)  # noqa: S603 (git from the PATH)
    except FileNotFoundError:
        return
    if "safe.directory" in git.stderr:
        fix = git.stderr.strip().splitlines()[-1].strip()  # with the path of the repository
        raise UserError(
            f"{Path.cwd()}: the repository belongs to another user, so git does not read it; if you trust its content, "
            f"run `{fix}`, then run this command again"
        )


def check_interpolated(text: bytes, where: str) -> None:
    """Check only what DVC needs to read the pipeline of a revision, whose code may have had other parameters.

    Raises:
        UserError: lists the parameters that DVC can't insert into `dvc.yaml`, with their values.
    """
    content = parse_params(text, where)
    inserted = {name: content[name] for name in INSTEAD_OF_NULL if name in content}
    raise_problems(find_problems(inserted, may_lack=True), where)


if __name__ == "__main__":
    run(check_project, exclusive=False)
