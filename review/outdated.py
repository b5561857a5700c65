"""Whether `dvc.lock` matches the code, the parameters, the data and the metrics, in the workspace or another revision.

The check needs neither the cache nor a remote: files that only they have are assumed to match `dvc.lock`.

`dvc repro --dry --allow-missing` is not sufficient. It ignores all missing files, including scripts and metrics, and if
data is missing, it stops at the first stage that is out of date, with an error about data. Neither notices metrics that
were edited together with their MD5 in `dvc.lock`.
"""

from collections.abc import Iterator
from pathlib import Path

from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage

from stages.data.files import read_json
from stages.download_model import folder_sha256


def differences(repo: Repo) -> Iterator[str]:
    """A line for each difference, with the stage, the file and the problem."""
    writers = {out.fs_path: out for stage in repo.index.stages for out in stage.outs}
    for stage in repo.index.stages:
        name = name_of(stage)
        if not any(recorded_hash(out) for out in stage.outs):
            yield f"{name}: is not in dvc.lock, so it never ran"
            continue
        if stage.changed_stage():
            yield f"{name}: its command changed since it ran"
        for file in [*stage.deps, *stage.outs]:
            if problem := difference(file, writers.get(file.fs_path)):
                yield f"{name}: {problem}"


def name_of(stage: Stage) -> str:
    """The name of a stage in dvc.yaml, or the file that `dvc add` has written."""
    return str(getattr(stage, "name", None) or stage.relpath)


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
    if not recorded_hash(file):
        return f"{file} is not in dvc.lock"
    if writer and recorded_hash(writer) != recorded_hash(file):
        return f"{file} was rewritten by {name_of(writer.stage)} since it ran"
    state = file.status().get(str(file))
    if isinstance(state, dict):
        return f"{', '.join(state)} in {file} changed since it ran"
    if state in ("deleted", "not in cache"):
        in_git = not writer.use_cache if writer else file.is_in_repo
        return f"{file} is missing" if in_git else ""
    if state:
        return f"{file} changed since it was written" if file is writer else f"{file} changed since it ran"
    return ""


def recorded_hash(file: Output) -> str | None:
    """The MD5 of an input or output of a stage in `dvc.lock`; None if it is not there."""
    value: str | None = file.hash_info.value  # the only use of this private attribute of DVC
    return value
