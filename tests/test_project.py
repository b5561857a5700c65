"""A project with data, a model, gates and scorers of its own passes all checks, and the tests of the code."""

import re
import shutil
from pathlib import Path

import pytest

from tests.clone import EVERY_STAGE, ROOT, commit, make_clone, run, run_pipeline, stages_run, tracked_files

pytestmark = pytest.mark.subprocess
# The code that make_clone leaves out because stages do not need it.
CHECKED = ("tests/", "review/", "benchmarks/", "docs/", ".ci/", ".github/", "Makefile", "pyproject.toml")
CHECKED += ("constraints.txt", "CONTRIBUTING.md", "LICENSE")
REPLICATE = ("replicate@1", "evaluate@replicates/1")
# Of files that depended on the workspace's parameters, data, README and reviews.
TESTS = "tests/demo tests/test_docs.py tests/test_dvc_yaml.py tests/test_params.py"


@pytest.fixture
def own(tmp_path: Path, tiny_model: Path) -> Path:
    """A project as its users leave it after the first `dvc repro`, with a remote."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    changes = {"dataset_file": "data/numbers.csv", "template": "chat", "replicate_seeds": "[1]"}
    folder = make_clone(tmp_path / "own", model, **changes)
    for name in tracked_files():
        if name.startswith(CHECKED) and not name.startswith("docs/reviews/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(folder / "templates/plain.jinja", model / "chat_template.jinja")
    (folder / "templates/plain.jinja").rename(folder / "templates/ours.jinja")
    (folder / "README.md").write_text("# Numbers\n")
    (folder / "gates.yaml").write_text("loss: {not_worse_by: 0.5}\n")
    (folder / "scorers.py").write_text("def brief(prompt, answer, reference, row):\n    return len(answer) < 9\n")
    (folder / "data/instructions.jsonl").unlink()
    (folder / "data/retention.jsonl").write_text("")
    rows = "".join(f"What follows {n}?,{n + 1}\n" for n in range(60))
    (folder / "data/numbers.csv").write_text("question,answer\n" + rows)
    run(folder, "dvc", "remote", "add", "--quiet", "--default", "storage", "s3://numbers/sft")
    run_pipeline(folder, *EVERY_STAGE, *REPLICATE)
    run(folder, "dvc", "commit", "--force", "--quiet")
    commit(folder, "results")
    return folder


@pytest.mark.usefixtures("fast_stages")
def test_checks_and_tests_pass_in_a_project_of_ones_own(own: Path) -> None:
    command = f"env -u PYTEST_XDIST_WORKER pytest -q -rs -m 'not subprocess' -p no:cacheprovider {TESTS}"
    installed = ("--old-file=.venv/installed", "--old-file=.venv/installed-dev")
    targets = ("check-lock", "review", "test", "repro")
    result = run(own, "make", *installed, *targets, "BASE=HEAD", f"PYTEST={command}")
    assert "dvc.lock matches the code" in result.stdout
    assert "passed: loss not worse than in HEAD" in result.stdout
    assert re.search(r"SKIPPED \[\d+\] tests/demo/__init__.py:\d+: this project is not the demo", result.stdout)
    assert " passed, " in result.stdout
    assert stages_run(result) == []
    run(own, "ruff", "check")
    run(own, "ruff", "format", "--check")
    assert run(own, "git", "status", "--porcelain").stdout == ""
