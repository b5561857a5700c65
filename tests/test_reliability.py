"""What docs/reliability.md says about DVC's messages, edits and merges, tried with real DVC."""

import re
from pathlib import Path

import pytest

from tests.clone import ROOT, copy_clone, edit, run

pytestmark = [pytest.mark.subprocess, pytest.mark.usefixtures("fast_stages")]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")


def commands(first_line: str) -> str:
    """The block of the page that begins with this line."""
    (found,) = re.findall(rf"^```console\n({re.escape(first_line)}\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def test_what_dvc_says_of_values_that_it_can_not_insert(ran: Path, tmp_path: Path) -> None:
    clone = copy_clone(ran, tmp_path / "clone")
    valid = (clone / "params.yaml").read_text()
    for parameter, message in (
        ("dataset_file", "unexpected error"),
        ("retention_file", "unexpected error"),
        ("replicate_seeds", "'Value' object is not iterable"),
    ):
        edit(clone, **{parameter: "null"})
        assert message in run(clone, "dvc", "repro", check=False).stderr
        assert message in PAGE
        (clone / "params.yaml").write_text(valid)


def test_edits_that_dvc_exp_apply_replaced_are_restored(with_experiment: Path, tmp_path: Path) -> None:
    clone = copy_clone(with_experiment, tmp_path / "clone")
    with (clone / "scorers.py").open("a") as file:
        file.write("# mine\n")
    run(clone, "dvc", "exp", "apply", "slow")
    assert "# mine" not in (clone / "scorers.py").read_text()
    assert run(clone, "git", "stash", "list").stdout == ""
    run(clone, "bash", "-ec", commands("git checkout ."))
    assert (clone / "scorers.py").read_text().endswith("# mine\n")
    assert run(clone, "git", "status", "--porcelain").stdout == " M scorers.py\n"


def test_a_merge_conflict_in_the_lock_is_resolved(with_experiment: Path, tmp_path: Path) -> None:
    clone = copy_clone(with_experiment, tmp_path / "clone")
    run(clone, "git", "checkout", "-q", "-b", "other")
    run(clone, "dvc", "exp", "apply", "slow")
    run(clone, "git", "commit", "-q", "-a", "-m", "slow")
    run(clone, "git", "checkout", "-q", "main")
    edit(clone, temperature="0.5")
    run(clone, "dvc", "repro", "generate@base", "generate@tuned")
    run(clone, "git", "commit", "-q", "-a", "-m", "colder")
    merge = run(clone, "git", "merge", "other", check=False)
    assert "Merge conflict in dvc.lock" in merge.stdout
    run(clone, "git", "checkout", "--theirs", "params.yaml")
    edit(clone, temperature="0.5")
    run(clone, "git", "add", "params.yaml")
    run(clone, "bash", "-ec", commands("git checkout HEAD -- dvc.lock metrics"), GIT_EDITOR="true")
    assert run(clone, "git", "status", "--porcelain").stdout == ""
    assert run(clone, "dvc", "status").stdout == "Data and pipelines are up to date.\n"
