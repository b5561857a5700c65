"""Fail unless dvc.lock describes the code, the parameters, the data and the metrics beside it.

Neither the cache nor a remote is needed: what lies there alone is taken to be what dvc.lock says.

DVC's own answer, `dvc repro --dry --allow-missing`, does not do. It passes over all that is missing, also scripts and
metrics, and where the data is missing it breaks off at the first stage that is out of date, with an error about data.
Not seen by it nor here: metrics that were edited by hand together with their MD5 in dvc.lock.
"""

import sys
from collections.abc import Iterator

from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo


def main() -> None:
    try:
        with Repo() as repo:
            num_stages = len(repo.index.stages)
            found = list(differences(repo))
    except DvcException as error:
        sys.exit(f"dvc.lock: not checked, since {error}; `dvc status` says where")
    if not num_stages:
        sys.exit("dvc.lock: not checked, since dvc.yaml is missing or has no stage")
    if found:
        what_to_do = "dvc.lock is out of date: run `dvc repro`, and commit dvc.lock and metrics/ with what you changed"
        sys.exit("\n".join([*found, what_to_do]))
    print("dvc.lock matches the code, the parameters, the data and the metrics")


def differences(repo: Repo) -> Iterator[str]:
    """A line for each difference: the stage, the file and what is wrong with it."""
    writers = {out.fs_path: out for stage in repo.index.stages for out in stage.outs}
    for stage in repo.index.stages:
        if not any(out.hash_info for out in stage.outs):
            yield f"{stage.addressing}: never ran, dvc.lock does not have it"
            continue
        if stage.changed_stage():
            yield f"{stage.addressing}: its command changed since it ran"
        for file in [*stage.deps, *stage.outs]:
            if wrong := difference(file, writers.get(file.fs_path)):
                yield f"{stage.addressing}: {wrong}"


def difference(file: Output, writer: Output | None) -> str:
    """What is wrong with a file that a stage reads or writes, or nothing.

    Args:
        file: as dvc.lock has it for that stage.
        writer: the same file as dvc.lock has it for the stage that writes it, if one does.
    """
    if not file.hash_info:
        return f"{file} is not in dvc.lock"
    if writer and writer.hash_info != file.hash_info:
        return f"{file} was written anew by {writer.stage.addressing} since it ran"
    state = file.status().get(str(file))
    if isinstance(state, dict):
        return f"{', '.join(state)} in {file} changed since it ran"
    if state in ("deleted", "not in cache"):
        git_holds_it = not writer.use_cache if writer else file.is_in_repo
        return f"{file} is missing" if git_holds_it else ""
    if state:
        return f"{file} is not what it wrote" if file is writer else f"{file} changed since it ran"
    return ""


if __name__ == "__main__":
    main()
