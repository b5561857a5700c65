"""Check that dvc.lock matches the code, the parameters, the data and the metrics; exit with code 1 if it does not.

`review/outdated.py` describes the check.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo

from review.outdated import changed_model, difference, differences, recorded_hash
from stages.runtime.errors import UserError
from stages.runtime.preflight import check_project
from stages.runtime.run import run

AFTER_A_CONFLICT = (
    "run `git checkout HEAD -- dvc.lock metrics`, which keeps the results of this side, then `dvc repro`, and commit "
    "dvc.lock and metrics/"
)
RESTORE_LINE_ENDS = (
    "commit or stash your edits, run `git rm -rq --cached . && git reset -q --hard`, and check again; .gitattributes "
    "keeps line ends as they are"
)


def main() -> None:
    check_project()
    try:
        with Repo() as repo:
            num_stages = len(repo.index.stages)
            problems = [*differences(repo), *changed_model()]
            advice = remedy(repo, len(problems)) if problems else ""
    except DvcException as error:
        lock = Path("dvc.lock")
        if lock.exists() and b"\n<<<<<<< " in lock.read_bytes():
            raise UserError(f"dvc.lock: has conflict markers; {AFTER_A_CONFLICT}") from None
        raise UserError(f"dvc.lock: can't be checked: {error}; `dvc status` shows where") from None
    if not num_stages:
        raise UserError("dvc.lock: can't be checked: dvc.yaml is missing or has no stages; restore it with git")
    if problems:
        sys.exit("\n".join([*problems, f"dvc.lock is out of date: {advice}"]))
    print("dvc.lock matches the code, the parameters, the data and the metrics")


def remedy(repo: Repo, num_differences: int) -> str:
    """What to do: restore metrics that only a formatter or an editor changed; otherwise run the pipeline."""
    if "i/lf    w/crlf" in git("ls-files", "--eol").decode():
        return f"files here have other line ends than in git: {RESTORE_LINE_ENDS}"
    restore: dict[str, list[str]] = {}  # revision: files
    for stage in repo.index.stages:
        for out in stage.outs:
            if not out.use_cache and difference(out, out) and (revision := revision_with(out)):
                restore.setdefault(revision, []).append(str(out))
    steps = [f"`git checkout {revision} -- {' '.join(files)}`" for revision, files in restore.items()]
    if sum(map(len, restore.values())) < num_differences:
        steps.append("`dvc repro`")
    return f"run {', then '.join(steps)}, then commit dvc.lock and metrics/ with your changes"


def revision_with(out: Output) -> str | None:
    """The newest commit in which an output that git tracks has the hash in dvc.lock."""
    for revision in ["HEAD", *git("log", "--max-count=20", "--format=%h", "--", str(out)).decode().split()]:
        if hashlib.md5(git("show", f"{revision}:./{out}"), usedforsecurity=False).hexdigest() == recorded_hash(out):
            return revision
    return None


def git(*arguments: str) -> bytes:
    """The output of a git command; empty if it fails."""
    return subprocess.run(["git", *arguments], capture_output=True).stdout  # noqa: S603, S607 (a list; git is on the path)


if __name__ == "__main__":
    run(main, exclusive=False)
