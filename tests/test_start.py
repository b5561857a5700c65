"""`make start` and `make update`: a project of one's own, and the merge of a newer pipeline, with real git and make."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stages.runtime.errors import UserError
from tests.clone import ROOT, commit, copy_clone, make_clone, run
from tools.merge_params import parameters
from tools.start import dataset

pytestmark = pytest.mark.subprocess

DEMO = {
    "README.md": (
        "# A\n<!-- results -->\n| loss | 1.8 |\n<!-- /results -->\n\n<!-- answer -->\n> Yes\n<!-- /answer -->\nZ\n"
    ),
    "dvc.lock": "schema: '2.0'\nstages: {train: {cmd: demo}}\n",
    "metrics/evaluate/tuned.json": '{"loss": 1.8}\n',
    "metrics/evaluate/tuned.csv": "loss\n1.8\n",
    "metrics/samples/tuned.md": "# Samples\n",
    "docs/reviews/learning-rate.md": "# Review\n",
    "votes/ada.jsonl": "{}\n",
    "must_pass.yaml": "# Test rows that must pass.\n- Is 91 a prime number?\n",
    "gates.yaml": "loss: {max: 3}\n",
}
PARAMS = {
    "dataset_file": "dataset_file: data/instructions.jsonl  # JSON or CSV",
    "dataset_name": "dataset_name: null                     # dataset id on the Hub",
    "model_name": "model_name: pypi:tiny==1#sha256=" + "0" * 64,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original repository: the code of the workspace, and results of a demo."""
    folder = make_clone(tmp_path_factory.mktemp("demo") / "upstream", Path("tiny"))
    for name in ("Makefile", ".gitattributes"):
        shutil.copy(ROOT / name, folder / name)
    write(folder, DEMO | {"params.yaml": replaced((folder / "params.yaml").read_text(), PARAMS)})
    commit(folder, "Results of the demo")
    return folder


@pytest.fixture
def upstream(tmp_path: Path, demo: Path) -> Path:
    return copy_clone(demo, tmp_path / "upstream")


@pytest.fixture
def clone(tmp_path: Path, upstream: Path) -> Path:
    """A clone of the original repository, and a CSV file outside of it."""
    (tmp_path / "mine.csv").write_text("question,answer\nIs it?,Yes\n")
    run(tmp_path, "git", "clone", "-q", "-o", "upstream", str(upstream), str(tmp_path / "mine"))
    return tmp_path / "mine"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replaced(params: str, lines: dict[str, str]) -> str:
    """The text of a params.yaml with other lines for some parameters."""
    return "".join(f"{lines.get(line.split(':')[0], line)}\n" for line in params.splitlines())


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "make", "--silent", "--old-file=.venv/installed", *arguments, check=False)


def start(folder: Path, data: str = "../mine.csv", model: str = "gpt2") -> str:
    result = run(folder, "python", "-m", "tools.start", data, model, check=False)
    assert result.returncode == 1
    assert run(folder, "git", "status", "--porcelain", "--untracked-files=no").stdout.strip() in ("", "M params.yaml")
    return result.stderr.strip()


def started(folder: Path) -> Path:
    result = make(folder, "start", "DATA=../mine.csv", "MODEL=gpt2")
    assert result.returncode == 0, result.stderr
    return folder


def test_start_sets_the_data_and_the_model_and_keeps_comments(clone: Path) -> None:
    before = (clone / "params.yaml").read_text()
    started(clone)
    lines = {
        "dataset_file": "dataset_file: data/mine.csv            # JSON or CSV",
        "model_name": "model_name: gpt2",
    }
    assert (clone / "params.yaml").read_text() == replaced(before, lines)
    assert (clone / "data/mine.csv").read_text() == "question,answer\nIs it?,Yes\n"


def test_start_empties_what_belongs_to_the_demo_and_nothing_else(clone: Path) -> None:
    started(clone)
    changed = run(clone, "git", "status", "--porcelain", "--untracked-files=all").stdout.splitlines()
    emptied = DEMO.keys() - {"gates.yaml", "votes/ada.jsonl"}
    expected = {f" M {name}" for name in [*emptied, "params.yaml"]} | {" D votes/ada.jsonl", "?? data/mine.csv"}
    assert set(changed) == expected
    assert {name: (clone / name).read_text() for name in emptied} == {
        "README.md": (
            "# A\n<!-- results -->\nNone yet: `make repro` writes them to `metrics/evaluate/`.\n<!-- /results -->\n\n"
            "<!-- answer -->\nNone yet: `make repro` writes them to `metrics/samples/`.\n<!-- /answer -->\nZ\n"
        ),
        "dvc.lock": "schema: '2.0'\nstages: {}\n",
        "metrics/evaluate/tuned.json": "{}\n",
        "metrics/evaluate/tuned.csv": "",
        "metrics/samples/tuned.md": "",
        "docs/reviews/learning-rate.md": (
            "This review belonged to the demo. It was removed when this project was started.\n"
        ),
        "must_pass.yaml": "# Test rows that must pass.\n",
    }


def test_a_file_inside_the_project_is_used_in_place_and_need_not_be_committed(clone: Path) -> None:
    shutil.move(clone.parent / "mine.csv", clone / "data/it's: mine.csv")
    run(clone, "python", "-m", "tools.start", str(clone / "data/it's: mine.csv"))
    assert "dataset_file: 'data/it''s: mine.csv'   # JSON or CSV\n" in (clone / "params.yaml").read_text()
    assert PARAMS["model_name"] in (clone / "params.yaml").read_text()  # no MODEL: it stays


def test_a_hub_dataset_is_used_instead_of_the_file(clone: Path) -> None:
    assert make(clone, "start", "DATA=yahma/alpaca-cleaned", "MODEL=gpt2").returncode == 0
    text = (clone / "params.yaml").read_text()
    assert PARAMS["dataset_file"] in text
    assert "dataset_name: yahma/alpaca-cleaned     # dataset id on the Hub\n" in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "DATA: found ''; must be a file, a folder or the id of a dataset on the Hub: make start DATA=path/to/"),
        ("no.csv", "DATA: found 'no.csv'; must be a file, a folder or the id of a dataset on the Hub: make start"),
        ("Makefile", "DATA: found 'Makefile'; must end in .json, .jsonl, .ndjson, .csv, .tsv (or these"),
        ("../rows", "DATA: '../rows' is not copied to data/: it is a folder; copy it yourself, and name the copy"),
        ("../instructions.jsonl", "is not copied to data/: another data/instructions.jsonl exists; copy it yourself"),
        ("../train.parquet", "DATA: git ignores data/train.parquet, often because a stage writes a file of this name;"),
        ("../empty.csv", "../empty.csv: is empty;"),
    ],
)
def test_data_that_can_not_be_used_is_refused(
    clone: Path, data: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(clone.parent, {"rows/a.jsonl": "{}", "instructions.jsonl": "{}", "train.parquet": "x", "empty.csv": ""})
    monkeypatch.chdir(clone)
    with pytest.raises(UserError, match=re.escape(message)):
        dataset(data)


def test_an_invalid_model_name_is_refused_and_nothing_changes(clone: Path) -> None:
    assert start(clone, model="pypi:tiny").splitlines() == [
        "error: params.yaml:",
        "  model_name: found 'pypi:tiny'; must be pypi:PACKAGE==VERSION#sha256=64 HEX DIGITS, a Hub id or a folder",
    ]
    assert run(clone, "git", "status", "--porcelain").stdout == ""


def test_start_is_refused_with_uncommitted_changes(clone: Path) -> None:
    with (clone / "params.yaml").open("a") as file:
        file.write("# mine\n")
    message = "error: uncommitted changes in params.yaml; commit them, or undo them with `git restore -SW .`"
    assert start(clone) == message
    run(clone, "git", "restore", "-SW", ".")
    started(clone)


def test_an_uncommitted_start_can_be_undone_and_repeated(clone: Path) -> None:
    started(clone)
    run(clone, "git", "restore", "-SW", ".")
    started(clone)  # data/mine.csv exists, with the same content


def test_a_second_start_is_refused(clone: Path) -> None:
    commit(started(clone), "My project")
    assert start(clone).startswith("error: already started, as docs/reviews/ shows; for other data")


def test_a_folder_without_git_is_refused(clone: Path) -> None:
    shutil.rmtree(clone / ".git")
    result = run(clone, "python", "-m", "tools.start", "../mine.csv", check=False)
    assert result.stderr.startswith("error: fatal: not a git repository")
    assert "`git init`" in result.stderr


# What a project writes and edits in a year, and what upstream changes meanwhile. Lines next to each other differ.
MINE = {
    "dvc.lock": "schema: '2.0'\nstages: {train: {cmd: mine}}\n",
    "metrics/evaluate/tuned.json": '{"loss": 2.5}\n',
    "metrics/evaluate/tuned.csv": "loss\n2.5\n",
    "metrics/samples/tuned.md": "# My samples\n",
    "README.md": "# My project\n",
    "must_pass.yaml": "- Is it?\n",
    "gates.yaml": "loss: {max: 2}\n",
    "scorers.py": "def mine(): ...\n",
    "templates/plain.jinja": "mine",
    "data/instructions.jsonl": "{}\n",
    "votes/bob.jsonl": '{"mine": 1}\n',
}
THEIRS = {
    "dvc.lock": "schema: '2.0'\nstages: {train: {cmd: new}}\n",
    "metrics/evaluate/tuned.json": '{"loss": 1.7}\n',
    "metrics/evaluate/tuned.csv": "loss\n1.7\n",
    "metrics/samples/tuned.md": "# New samples\n",
    "README.md": DEMO["README.md"].replace("1.8", "1.7"),
    "docs/reviews/learning-rate.md": "# New review\n",
    "must_pass.yaml": DEMO["must_pass.yaml"] + "- Is 97 one?\n",
    "gates.yaml": "loss: {max: 4}\n",
    "scorers.py": "def theirs(): ...\n",
    "templates/plain.jinja": "theirs",
    "data/instructions.jsonl": "[]\n",
}


def publish(upstream: Path) -> None:
    """Commit a newer version upstream: code, results, and new parameters next to those that a project changes."""
    write(upstream, THEIRS | {"stages/new.py": "# new\n", "tools/clean.py": "# newer\n"})
    lines = {
        "dataset_file": f"{PARAMS['dataset_file']}\nnew_data: 1  # new",
        "model_name": f"{PARAMS['model_name']}\nnew_model: [a,\n  b]",
        "seed": "seed: 43",
    }
    params = upstream / "params.yaml"
    params.write_text(replaced(params.read_text(), lines))
    commit(upstream, "A newer version")


def test_an_update_keeps_files_and_results_of_the_project_and_brings_new_code(clone: Path, upstream: Path) -> None:
    commit(started(clone), "My project")
    write(clone, MINE)
    params = replaced((clone / "params.yaml").read_text(), {"batch_size": "batch_size: 7  # fits my GPU"})
    (clone / "params.yaml").write_text(params)
    commit(clone, "Results")
    publish(upstream)

    result = make(clone, "update")

    assert result.returncode == 0, result.stdout + result.stderr
    assert run(clone, "git", "status", "--porcelain").stdout == ""
    assert run(clone, "git", "merge-base", "--is-ancestor", "upstream/main", "HEAD").returncode == 0
    assert {name: (clone / name).read_text() for name in MINE} == MINE
    assert (clone / "docs/reviews/learning-rate.md").read_text().startswith("This review belonged to the demo.")
    assert (clone / "stages/new.py").exists()
    assert (clone / "tools/clean.py").read_text() == "# newer\n"
    lines = {
        "dataset_file": "dataset_file: data/mine.csv            # JSON or CSV\nnew_data: 1  # new",
        "model_name": "model_name: gpt2\nnew_model: [a,\n  b]",
        "seed": "seed: 43",
    }
    assert (clone / "params.yaml").read_text() == replaced(params, lines)


def test_a_project_without_results_is_updated_without_conflict(clone: Path, upstream: Path) -> None:
    commit(started(clone), "My project")
    publish(upstream)
    assert make(clone, "update").returncode == 0
    assert (clone / "dvc.lock").read_text() == "schema: '2.0'\nstages: {}\n"
    assert (clone / "metrics/evaluate/tuned.json").read_text() == "{}\n"


def test_a_copy_without_history_is_connected_once(clone: Path, upstream: Path) -> None:
    shutil.rmtree(clone / ".git")
    run(clone, "git", "init", "-q", "-b", "main")
    commit(clone, "Copy")
    run(clone, "git", "remote", "add", "upstream", str(upstream))
    page = (ROOT / "docs/project.md").read_text(encoding="utf-8")
    (block,) = (text for text in page.split("```") if "--allow-unrelated-histories" in text)
    copied_from = run(upstream, "git", "rev-parse", "HEAD").stdout.strip()
    run(clone, "bash", "-ec", block.removeprefix("console").replace("COMMIT", copied_from))
    commit(started(clone), "My project")
    write(clone, MINE)
    commit(clone, "Results")
    publish(upstream)
    assert make(clone, "update").returncode == 0
    assert {name: (clone / name).read_text() for name in MINE} == MINE
    assert (clone / "stages/new.py").exists()


def test_a_merge_within_a_team_loses_no_side(clone: Path) -> None:
    run(clone, "git", "checkout", "-q", "-b", "stricter")
    (clone / "gates.yaml").write_text("loss: {max: 2}\n")
    commit(clone, "Stricter")
    run(clone, "git", "checkout", "-q", "main")
    (clone / "gates.yaml").write_text("loss: {max: 1}\n")
    commit(clone, "Stricter still")
    result = run(clone, "git", "merge", "stricter", check=False)
    assert "CONFLICT (content): Merge conflict in gates.yaml" in result.stdout


def merge_params(folder: Path, base: str, ours: str, theirs: str) -> tuple[str, str]:
    """The merged text, and what is printed."""
    write(folder, {"base": base, "ours": ours, "theirs": theirs})
    printed = run(folder, "python", "-m", "tools.merge_params", "base", "ours", "theirs", PYTHONPATH=str(ROOT)).stdout
    return (folder / "ours").read_text(), printed


@pytest.mark.parametrize(
    ("theirs", "merged", "upstream"),
    [("a: 4\nb: 5\nc: 6\n", "a: 3\nb: 5\nc: 6\n", "a: 4"), ("b: 2\n", "b: 2\n", "removed it")],
)
def test_a_parameter_that_both_sides_changed_is_printed_and_stays_if_upstream_has_it(
    tmp_path: Path, theirs: str, merged: str, upstream: str
) -> None:
    message = f"params.yaml: changed on both sides: yours: a: 3; upstream: {upstream}\n"
    assert merge_params(tmp_path, "a: 1\nb: 2\n", "a: 3\nb: 2\n", theirs) == (merged, message)


def test_a_list_of_several_lines_and_comments_of_the_project_are_kept(tmp_path: Path) -> None:
    base = "# Data\na: 1\n\n# Answers\nb:\n  - x\n"
    ours = "# Data\n# why\na: 1\n\n# Answers\nb:\n  - |-\n    p\n\n    q: r"
    assert merge_params(tmp_path, base, ours, base + "c: 3\n") == (f"{ours}\nc: 3\n", "")


def test_the_comments_above_a_parameter_belong_to_it() -> None:
    assert parameters("# Data\na: 1\n\n# Model\n# of mine\nb:\n  - 2\n\n  - 3\n") == {
        "a": "# Data\na: 1\n",
        "b": "\n# Model\n# of mine\nb:\n  - 2\n\n  - 3\n",
    }
