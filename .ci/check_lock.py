"""Check that dvc.lock matches the code, the parameters, the data and the metrics; exit with code 1 if it does not.

The check needs neither the cache nor a remote: files that only they have are assumed to match dvc.lock.

`dvc repro --dry --allow-missing` is not sufficient. It ignores all missing files, including scripts and metrics, and if
data is missing, it stops at the first stage that is out of date, with an error about data. Neither notices metrics that
were edited together with their MD5 in dvc.lock.
"""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo

from stages.download_model import folder_sha256
from stages.runtime.errors import UserError
from stages.runtime.files import read_json
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
            found = [*differences(repo), *changed_model()]
            advice = remedy(repo, len(found)) if found else ""
    except DvcException as error:
        lock = Path("dvc.lock")
        if lock.exists() and b"\n<<<<<<< " in lock.read_bytes():
            raise UserError(f"dvc.lock: has conflict markers; {AFTER_A_CONFLICT}") from None
        raise UserError(f"dvc.lock: can't be checked: {error}; `dvc status` shows where") from None
    if not num_stages:
        raise UserError("dvc.lock: can't be checked: dvc.yaml is missing or has no stages; restore it with git")
    if found:
        sys.exit("\n".join([*found, f"dvc.lock is out of date: {advice}"]))
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
        if hashlib.md5(git("show", f"{revision}:./{out}"), usedforsecurity=False).hexdigest() == out.hash_info.value:
            return revision
    return None


def git(*arguments: str) -> bytes:
    """The output of a git command; empty if it fails."""
    return subprocess.run(["git", *arguments], capture_output=True).stdout  # noqa: S603, S607 (a list; git is on the path)


def differences(repo: Repo) -> Iterator[str]:
    """A line for each difference, with the stage, the file and the problem."""
    writers = {out.fs_path: out for stage in repo.index.stages for out in stage.outs}
    for stage in repo.index.stages:
        if not any(out.hash_info for out in stage.outs):
            yield f"{stage.addressing}: is not in dvc.lock, so it never ran"
            continue
        if stage.changed_stage():
            yield f"{stage.addressing}: its command changed since it ran"
        for file in [*stage.deps, *stage.outs]:
            if problem := difference(file, writers.get(file.fs_path)):
                yield f"{stage.addressing}: {problem}"


def changed_model() -> Iterator[str]:
    """A line if `model_name` is a folder whose files changed after `download_model` ran; DVC does not track them."""
    path = Path("models/base/source.json")
    source = read_json(path) if path.exists() else {}
    folder = Path(source.get("model_name", ""))
    if "sha256" in source and folder.is_dir() and folder_sha256(folder) != source["sha256"]:
        yield f"download_model: {folder} changed since it ran; run `dvc repro --force -s download_model`"


def difference(file: Output, writer: Output | None) -> str:
    """The problem with an input or output of a stage; an empty string if there is none.

    Args:
        file: the entry in dvc.lock for this stage.
        writer: the entry for the stage that writes the file; None if it is not an output.
    """
    if not file.hash_info:
        return f"{file} is not in dvc.lock"
    if writer and writer.hash_info != file.hash_info:
        return f"{file} was rewritten by {writer.stage.addressing} since it ran"
    state = file.status().get(str(file))
    if isinstance(state, dict):
        return f"{', '.join(state)} in {file} changed since it ran"
    if state in ("deleted", "not in cache"):
        in_git = not writer.use_cache if writer else file.is_in_repo
        return f"{file} is missing" if in_git else ""
    if state:
        return f"{file} changed since it was written" if file is writer else f"{file} changed since it ran"
    return ""


if __name__ == "__main__":
    run(main, exclusive=False)
