"""Shared fixtures: a tiny model, and projects in which stages have run."""

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from huggingface_hub import close_session
from hypothesis import settings

from stages.data.examples import SCORING_SCHEMA, SPLIT_SCHEMA, Example
from stages.data.files import write_json
from stages.data.tables import parquet_writer
from stages.data.tokenizer import load_tokenizer
from stages.templates.alpaca import AlpacaTemplate, render_alpaca
from stages.templates.conversations import Conversation
from tests import HUB_PORT
from tests.clone import (
    ROOT,
    USER_FILES,
    commit,
    copy_clone,
    copy_tree,
    edit,
    make_clone,
    make_tiny_model,
    run,
    run_pipeline,
    stages_run,
)
from tests.fork_server import start_server
from tests.hub_server import Hub, serve

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


def shared(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that the first pytest-xdist worker builds and all workers use."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            partial.rename(folder)
    return folder


def pytest_configure() -> None:
    gc.disable()  # until the tests are imported


def pytest_collection_finish() -> None:
    gc.freeze()  # the garbage collector would search the imported modules again and again
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests first, so that no pytest-xdist worker is left with a slow file at the end."""
    items.sort(key=lambda item: item.get_closest_marker("subprocess") is None)


@pytest.fixture(autouse=True)
def _only_marked_tests_start_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.get_closest_marker("subprocess"):

        def refuse(*_: object, **__: object) -> None:
            pytest.fail("this test starts a program; mark it with pytest.mark.subprocess")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "tiny_model", make_tiny_model)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with params.yaml, dvc.yaml and an empty retention set as the working directory."""
    shutil.copy(USER_FILES / "params.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/retention.jsonl").touch()
    (tmp_path / "data/template.jinja").write_text("{# alpaca #}\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project in which every stage up to split has run, for tests to copy."""

    def build(folder: Path) -> None:
        copy_tree(USER_FILES, folder)
        copy_tree(ROOT / "stages", folder / "stages")
        shutil.copy(ROOT / "dvc.yaml", folder)
        for name, num_rows in (("instructions", 60), ("retention", 5)):
            file = folder / f"data/{name}.jsonl"
            lines = file.read_text(encoding="utf-8").splitlines(True)
            file.write_text("".join(lines[:num_rows]), encoding="utf-8")
        edit(folder, model_name=str(tiny_model), max_length="512")
        run_pipeline(folder, "download_dataset", "download_model", "format", "score_rows", "split")

    return shared(tmp_path_factory, "prepared", build)


@pytest.fixture
def training_inputs(project: Path, tiny_model: Path) -> Path:
    """The inputs of train and replicate: 22 examples of different lengths, a tiny base model; 24 steps in fp32.

    There are 5 examples for validation and 3 for test, which have no check, and no retention set.
    """
    copy_tree(ROOT / "stages", project / "stages")
    for name in ("base", "tokenizer"):
        shutil.copytree(tiny_model, project / "models" / name)
    write_json(project / "models/base/source.json", {"model_name": "tiny", "revision": None})
    write_json(project / "data/source.json", {"source": "a.jsonl", "revision": None, "license": None})
    template = AlpacaTemplate(load_tokenizer())
    prompt_format = {"chat_template": template.chat_template, "eos_token_ids": template.eos_token_ids}
    write_json(project / "data/prompt_format.json", prompt_format)
    splits = {"train": range(22), "validation": range(22, 27), "test": range(27, 30), "retention": range(0)}
    with parquet_writer(project / "data/scoring.parquet", SCORING_SCHEMA) as writer:
        writer.write([{"split": "test", "example_id": str(n), "other_columns": "{}"} for n in splits["test"]])
    for name, numbers in splits.items():
        with parquet_writer(project / f"data/{name}.parquet", SPLIT_SCHEMA) as writer:
            for n in numbers:
                question = {"role": "user", "content": "Name a colour." * (1 + n % 3)}
                answer = {"role": "assistant", "content": "Red. " * (1 + n % 7)}
                formatted = template.format([Conversation([question, answer], "x" * (n % 2))], 256)
                encoded = {"input_ids": formatted.encoded.input_ids, "labels": formatted.encoded.labels}
                ids = {"example_id": str(n), "prompt_id": str(n), "slice": "a.jsonl", "source_row": n}
                writer.write([{**ids, "response": formatted.responses[0], **encoded}])
    edit(project, batch_size="2", gradient_accumulation_steps="2", num_epochs="4", eval_steps="6", save_steps="5")
    edit(project, learning_rate="1e-3", lr_scheduler="cosine", warmup_steps="3", logging_steps="1", precision="fp32")
    return project


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A clone in which the pipeline has run and its results are committed, for tests to copy with `copy_clone`.

    The stages run in this process, and `dvc commit` records them: a tenth of the time of `dvc repro`, whose results are
    compared with these in test_pipeline.py.
    """

    def build(folder: Path) -> None:
        make_clone(folder, tiny_model)
        run_pipeline(folder)
        run(folder, "dvc", "commit", "--force", "--quiet")
        commit(folder, "results")

    return shared(tmp_path_factory, "ran", build)


@pytest.fixture(scope="session")
def fast_stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let `python -m stages.NAME` and `dvc` run in forks of one process."""
    pytest_process = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()

    def start(folder: Path) -> None:
        folder.mkdir()
        start_server(folder / "socket", pytest_process)

    with pytest.MonkeyPatch.context() as context:
        context.setenv("FORK_SERVER", str(shared(tmp_path_factory, "fork_server", start) / "socket"))
        yield


@pytest.fixture(scope="session")
def with_experiment(tmp_path_factory: pytest.TempPathFactory, ran: Path, fast_stages: None) -> Path:
    """A copy of `ran` with an experiment `slow`, which has another learning rate, so only affected stages run."""

    def build(folder: Path) -> None:
        copy_clone(ran, folder)
        result = run(folder, "dvc", "exp", "run", "-n", "slow", "-S", "learning_rate=1e-5")
        assert stages_run(result) == ["check_params", "evaluate@tuned", "generate@tuned", "predict@tuned", "train"]
        run(folder, "git", "checkout", "-q", ".")
        run(folder, "dvc", "checkout", "--force")

    return shared(tmp_path_factory, "with_experiment", build)


@pytest.fixture
def hub_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the Hub, which only one test at a time may use."""
    with FileLock(shared(tmp_path_factory, "hub_port", Path.mkdir) / "lock"):
        yield HUB_PORT
        close_session()  # a connection that the client keeps would still be served


@pytest.fixture
def hub(hub_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A local server with the Hub's API."""
    with serve(tmp_path_factory.mktemp("hub"), hub_port) as hub:
        yield hub


def example(prompt: list[int], response: list[int], example_id: str = "x") -> Example:
    """An example with literal token ids; the response includes its EOS token."""
    ids = np.array(prompt + response, np.int32)
    return Example(example_id, ids, np.array([-100] * len(prompt) + response, np.int32))


def predictions(losses: Any, **columns: Any) -> pd.DataFrame:
    """Predictions with these losses, and other columns with these values or the same value in each row."""
    numbers = range(len(losses))
    values = {
        "split": "test",
        "example_id": [f"id{n}" for n in numbers],
        "prompt_id": [f"p{n}" for n in numbers],
        "slice": "all",
        "loss": losses,
        "tokens": 10,
        "correct_tokens": 5,
        "answer": [f"answer {n}" for n in numbers],
        "num_answers": 1,
        "answer_tokens": 8.0,
        "stopped": 1.0,
        "reference_fits": True,
        "checked": True,
        "passed": 1,
        "exact_match": 0.0,
        "rouge_l": 0.5,
        "repetition": 0.0,
    }
    return pd.DataFrame(values | columns).astype({"passed": int})


def revision(rows: pd.DataFrame | None, is_measured: bool = True) -> Any:
    """A revision with these predictions, if any, of the prompts Say 0., Say 1., ..., and with metrics if measured."""

    def read_table(path: str, columns: list[str] | None = None) -> pd.DataFrame | None:
        if rows is None:
            return None
        table = rows.assign(prompt=[render_alpaca(f"Say {n}.") for n in range(len(rows))])
        return table.reindex(columns=columns) if columns else table

    return SimpleNamespace(name="new", read_table=read_table, read_json=lambda _: {"loss": 1.0} if is_measured else {})
