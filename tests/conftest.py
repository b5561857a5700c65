"""Shared fixtures: a tiny model and tokenizer made on the spot, and examples of literal token ids."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stages.shared.examples import Example
from tests.clone import EVERY_STAGE, make_clone, make_tiny_model, run, stages_run
from tests.test_params import edit


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder as the working directory, with the project's params.yaml."""
    root = Path(__file__).parent.parent
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    (tmp_path / "dvc.yaml").write_bytes((root / "dvc.yaml").read_bytes())
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project in which every stage up to split has run, so that any stage can."""
    folder = tmp_path_factory.mktemp("prepared")
    from stages import download_dataset, download_model, format, split  # noqa: A004

    root = Path(__file__).parent.parent
    for name in ("params.yaml", "dvc.yaml", "stages", "templates"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, folder / name)
    (folder / "data").mkdir()
    rows = (root / "data/instructions.jsonl").read_text(encoding="utf-8").splitlines(True)[:60]
    (folder / "data/instructions.jsonl").write_text("".join(rows), encoding="utf-8")
    edit(folder, model_name=str(tiny_model), max_length="512")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        for stage in (download_dataset, download_model, format, split):
            stage.main()
    return folder


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A clone in which `dvc repro` has run, nothing of it committed. For tests to copy, with `copy_clone`."""
    folder = make_clone(tmp_path_factory.mktemp("ran") / "clone", tiny_model)
    assert stages_run(run(folder, "dvc", "repro")) == sorted(EVERY_STAGE)
    return folder


def example(prompt: list[int], response: list[int], example_id: str = "x") -> Example:
    """An example of literal token ids; the response carries its own end token."""
    ids = np.array(prompt + response, np.int32)
    return Example(example_id, ids, np.array([-100] * len(prompt) + response, np.int32))
