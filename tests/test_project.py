"""A project with data, a model and gates of its own passes all checks; its own files are not those of the tests."""

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.clone import EVERY_STAGE, ROOT, commit, edit, run, run_pipeline, tracked_files

pytestmark = pytest.mark.subprocess
OF_THE_DEMO = ("data/instructions.jsonl", "data/README.md", "docs/reviews/", "dvc.lock", "metrics/", "must_pass.yaml")
FORMERLY_OF_THE_DEMO = ("demo", "test_chat.py", "test_docs.py", "test_dvc_yaml.py", "test_params.py")
REPLICATES = ("replicate@1", "replicate@2", "evaluate@replicates/1", "evaluate@replicates/2")


@pytest.fixture
def own(tmp_path: Path, tiny_model: Path) -> Path:
    """A project as its users leave it after the first `dvc repro`, with a remote."""
    folder = tmp_path / "own"
    for name in tracked_files():
        if not name.startswith(OF_THE_DEMO):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (folder / "templates/plain.jinja").read_text()
    tokenizer.save_pretrained(tmp_path / "model")
    (folder / "templates/plain.jinja").unlink()
    (folder / "README.md").write_text("# Numbers\n")
    (folder / "gates.yaml").write_text("loss: {not_worse_by: 0.5}\n")
    (folder / "scorers.py").write_text("def brief(prompt, answer, reference, row):\n    return len(answer) < 9\n")
    (folder / "data/retention.jsonl").write_text("")
    rows = "".join(f"What follows {n}?,{n + 1}\n" for n in range(60))
    (folder / "data/numbers.csv").write_text("question,answer\n" + rows)
    edit(folder, dataset_file="data/numbers.csv", model_name=str(tmp_path / "model"), template="chat")
    edit(folder, max_length="512", replicate_seeds="[1, 2]", max_new_tokens="4", learning_rate="1e-3")
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "remote", "add", "--quiet", "--default", "storage", "s3://numbers/sft")
    run_pipeline(folder, *EVERY_STAGE, *REPLICATES)
    run(folder, "dvc", "commit", "--force", "--quiet")
    commit(folder, "results")
    return folder


@pytest.mark.usefixtures("fast_stages")
def test_checks_and_tests_pass_in_a_project_of_ones_own(own: Path) -> None:
    tests = " ".join(f"tests/{name}" for name in FORMERLY_OF_THE_DEMO)
    pytest_command = f"env -u PYTEST_XDIST_WORKER pytest -q -rs -p no:cacheprovider {tests}"
    make = ("make", "--assume-old=.venv/installed", "check-lock", "review", "test", "BASE=HEAD")
    result = run(own, *make, f"PYTEST={pytest_command}")
    assert "dvc.lock matches the code" in result.stdout
    assert re.search(r"SKIPPED \[\d+\] tests/demo/__init__.py:\d+: this project is not the demo", result.stdout)
    assert " passed, " in result.stdout
    run(own, "ruff", "check")
    run(own, "ruff", "format", "--check")
    assert run(own, "git", "status", "--porcelain").stdout == ""
