"""Check what DVC can't report well, or only after stages have run. `make` runs it before `dvc repro`.

DVC inserts parameters into `dvc.yaml` and deletes the outputs of a stage before the stage can check its parameters, and
it meets a repository of another user only when all stages have run.
"""

import os
import subprocess
from pathlib import Path

from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams, load_params
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


if __name__ == "__main__":
    run(check_project, exclusive=False)
