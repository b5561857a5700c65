"""What is checked before DVC starts: the owner of the repository, and parameters that DVC inserts into dvc.yaml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.errors import UserError
from stages.runtime.preflight import check_interpolated
from tests.clone import ROOT, edit, run


def preflight(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": str(ROOT), "GIT_CONFIG_GLOBAL": "/dev/null"}
    return run(folder, sys.executable, "-m", "stages.runtime.preflight", check=False, **env)


@pytest.mark.subprocess
def test_a_valid_project_passes_without_output_and_without_git(project: Path) -> None:
    result = preflight(project)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.subprocess
def test_all_parameters_are_checked_before_dvc_reads_them(project: Path) -> None:
    edit(project, retention_file="null", replicate_seeds="null", learning_rate="-1")
    result = preflight(project)
    assert (result.returncode, result.stdout, result.stderr.splitlines()) == (
        1,
        "",
        [
            "error: params.yaml:",
            "  retention_file: found null; must be a valid string; for none, the path of an empty file",
            "  learning_rate: found -1; must be greater than 0",
            "  replicate_seeds: found null; must be a valid list; for none, []",
        ],
    )


@pytest.mark.subprocess
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can change the owner of a file")
def test_a_repository_of_another_user_is_explained_and_the_advice_helps(project: Path, tmp_path: Path) -> None:
    run(project, "git", "init", "-q")
    shutil.chown(project, 12345)
    shutil.chown(project / ".git", 12345)
    result = preflight(project)
    fix = f"git config --global --add safe.directory {project}"
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        f"error: {project}: the repository belongs to another user, so git does not read it; if you trust its "
        f"content, run `{fix}`, then run this command again\n",
    )
    config = {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"), "PYTHONPATH": str(ROOT)}
    run(project, *fix.split(), **config)
    assert run(project, sys.executable, "-m", "stages.runtime.preflight", **config).stderr == ""


def test_in_a_revision_only_the_parameters_that_dvc_inserts_are_checked() -> None:
    check_interpolated(b"learning_rate: -1\nolder: 1\ndataset_file: a.csv\n", "params.yaml of main")
    with pytest.raises(UserError) as error:
        check_interpolated(b"learning_rate: -1\nlauncher: null\ndataset_file: 3\n", "params.yaml of main")
    assert str(error.value).splitlines() == [
        "params.yaml of main:",
        "  dataset_file: found the number 3; must be text; put it in quotes",
        "  launcher: found null; must be a valid string; for a single process, python",
    ]
