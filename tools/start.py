"""Start a project of one's own: set its data and model, and empty what belongs to the demo. `make start` runs it."""

import argparse
import filecmp
import re
import shutil
import subprocess
from pathlib import Path

import yaml

from stages.data.files import write_text
from stages.rows.readers import READERS
from stages.rows.sources import find_files
from stages.rows.text_files import file_format
from stages.runtime.errors import UserError
from stages.runtime.params import PARAMS_FILE, DownloadModelParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary

HUB_ID = re.compile(r"[\w-]+|[\w-][\w.-]*/[\w-][\w.-]*")
NO_REVIEW = "This review belonged to the demo. It was removed when this project was started.\n"
NO_RESULTS = {
    "repro": "None yet: `make repro` prints it.",
    "review": "None yet: `make review` prints it.",
    "results": "None yet: `make repro` writes them to `metrics/evaluate/`.",
    "answer": "None yet: `make repro` writes them to `metrics/samples/`.",
}
# Emptied, not deleted: git reports a conflict if one side deletes a file that the other side changes.
EMPTY_LOCK = "schema: '2.0'\nstages: {}\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.start", description=__doc__)
    parser.add_argument("data", help="a file or folder with rows, or the id of a dataset on the Hub")
    parser.add_argument("model", nargs="?", default="", help="a value of model_name; the one in params.yaml by default")
    options = parser.parse_args()
    check_can_start()
    values = dataset(options.data)
    set_params(values | ({"model_name": options.model} if options.model else {}))
    file = values.get("dataset_file")
    if file and not Path(file).exists():
        shutil.copyfile(options.data, file)
    empty_demo()
    summary(
        {
            "data": file or options.data,
            "model": load_params(DownloadModelParams).model_name,
            "emptied": "metrics/, dvc.lock, must_pass.yaml, votes/, docs/reviews/ and the results in README.md",
        },
        wrote=[PARAMS_FILE],
        then="make repro, then `git add --all` and `git commit`; docs/project.md has more",
    )


def check_can_start() -> None:
    """Check that git can restore everything that is emptied.

    Raises:
        UserError: not a git repository, already started, or uncommitted changes.
    """
    if any(page.read_text(encoding="utf-8") == NO_REVIEW for page in Path("docs/reviews").glob("*.md")):
        raise UserError("already started, as docs/reviews/ shows; for other data or another model, edit params.yaml")
    if changed := git("status", "--porcelain", "--untracked-files=no", "--", "."):
        names = ", ".join(line[3:] for line in changed)
        raise UserError(f"uncommitted changes in {names:.200}; commit them, or undo them with `git restore -SW .`")


def git(*arguments: str) -> list[str]:
    """The lines that a git command prints."""
    command = ["git", "-c", "core.quotePath=off", *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape")  # noqa: S603 (a list)
    if result.returncode > 1:  # 1: no file is ignored
        raise UserError(f"{result.stderr.strip()}; run in a clone, or first `git init`, `git add --all`, `git commit`")
    return result.stdout.splitlines()


def dataset(data: str) -> dict[str, str | None]:
    """The parameters that select the data: a path in the project, or a Hub dataset.

    A file outside the project, which git does not track, is in data/ after it is copied.

    Raises:
        UserError: it is neither, or not a file that the pipeline can read and git can track.
    """
    path = Path(data)
    if not data or not path.exists():
        if HUB_ID.fullmatch(data) and file_format(path) not in READERS:
            return {"dataset_name": data}
        raise UserError(
            f"DATA: found {data!r}; must be a file, a folder or the id of a dataset on the Hub: "
            "make start DATA=path/to/mine.csv MODEL=gpt2"
        )
    for file in find_files(path, "DATA"):
        file.open("rb").close()  # fails if it is not readable
    project, target = Path.cwd(), path.resolve()
    if not target.is_relative_to(project):
        target = project / "data" / path.name
        is_other = target.exists() and not filecmp.cmp(path, target, shallow=False)
        if path.is_dir() or is_other:
            found = f"another data/{path.name} exists" if is_other else "it is a folder"
            raise UserError(f"DATA: {data!r} is not copied to data/: {found}; copy it yourself, and name the copy")
    name = str(target.relative_to(project))
    if git("check-ignore", "--", name):
        raise UserError(f"DATA: git ignores {name}, often because a stage writes a file of this name; rename {data}")
    return {"dataset_file": name, "dataset_name": None}


def set_params(values: dict[str, str | None]) -> None:
    """Replace values in params.yaml; comments stay.

    Raises:
        UserError: a value is invalid; the file is then unchanged.
    """
    before = PARAMS_FILE.read_text(encoding="utf-8")
    lines = before.splitlines()
    for number, line in enumerate(lines):
        if (name := line.partition(":")[0]) in values:
            lines[number] = yaml.safe_dump({name: values[name]}, allow_unicode=True, width=10**6).rstrip()
            if comment := re.search(r"\s(#.*)", line):
                lines[number] = f"{lines[number]:<{comment.start()}} {comment[1]}"
    write_text(PARAMS_FILE, "\n".join([*lines, ""]))
    try:
        load_params(DownloadModelParams)  # checks the whole file
    except UserError:
        write_text(PARAMS_FILE, before)
        raise


def empty_demo() -> None:
    """Empty the demo's results, reviews, votes and must-pass entries."""
    write_text(Path("dvc.lock"), EMPTY_LOCK)
    for path in map(Path, git("ls-files", "metrics", "docs/reviews", "votes")):
        if path.parts[0] == "votes":
            path.unlink()
        elif path.parts[0] == "docs":
            write_text(path, NO_REVIEW)
        else:
            write_text(path, "{}\n" if path.suffix == ".json" else "")
    must_pass = Path("must_pass.yaml")
    lines = must_pass.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(must_pass, "".join(line for line in lines if line.startswith("#")))
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    for name, line in NO_RESULTS.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(?=<!-- /{name} -->)", rf"\g<1>{line}\n", text, flags=re.DOTALL)
    write_text(readme, text)


if __name__ == "__main__":
    run(main)
