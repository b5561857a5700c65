"""Downloads from the Hub with the real clients, from a small local server."""

import io
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import HF_HOME
from tests.clone import ROOT, edit
from tests.fork_server import run_forked
from tests.hub_server import COMMIT, Hub

pytestmark = [pytest.mark.subprocess, pytest.mark.usefixtures("fast_stages")]
ROWS = [
    {"instruction": "Name a color.", "input": "", "output": "Red."},
    {"instruction": "Add.", "input": "2, 3", "output": "5."},
    {"instruction": "Name a fish.", "input": "", "output": "Cod."},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def _new_cache(hub_port: int) -> None:
    empty_cache()


def empty_cache() -> None:
    for path in Path(HF_HOME).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_stage(stage: str) -> subprocess.CompletedProcess[str]:
    """Run a stage in a new process, as DVC does."""
    return run_forked(Path.cwd(), ["-m", f"stages.{stage}"], {**os.environ, "PYTHONPATH": str(ROOT)})


def succeed(stage: str) -> None:
    result = run_stage(stage)
    assert result.returncode == 0, result.stderr


def test_a_dataset_is_downloaded_at_its_revision_and_its_commit_and_license_are_recorded(
    project: Path, hub: Hub
) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    edit(project, dataset_name="acme/rows", dataset_revision="v1", max_examples="2")
    succeed("download_dataset")
    rows = pq.read_table("data/raw.parquet").to_pylist()
    assert [
        (row["source"], row["source_row"], json.loads(row["messages"])[1]["content"], row["input"]) for row in rows
    ] == [
        ("acme/rows", 1, "Red.", ""),
        ("acme/rows", 2, "5.", "2, 3"),
    ]
    assert json.loads(Path("data/source.json").read_text()) == {
        "source": "acme/rows",
        "subset": None,
        "split": "train",
        "revision": COMMIT,
        "license": "cc0-1.0",
        "columns_not_read": [],
    }
    assert "GET /api/datasets/acme/rows/revision/v1" in hub.requests
    assert any(f"/datasets/acme/rows/resolve/{COMMIT}/train.jsonl" in request for request in hub.requests)


def test_a_model_is_downloaded_at_its_revision_without_code_and_pickles(
    project: Path, hub: Hub, tiny_model: Path
) -> None:
    hub.add("models/acme/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.add("models/acme/tiny", {"run_me.py": b"raise SystemExit", "pytorch_model.bin": b"a pickle"})
    edit(project, model_name="acme/tiny", model_revision="v1")
    succeed("download_model")
    assert json.loads(Path("models/base/source.json").read_text()) == {"model_name": "acme/tiny", "revision": COMMIT}
    assert (project / "models/base/model.safetensors").stat().st_size > 0
    assert (project / "models/tokenizer/tokenizer.json").is_file()
    assert "GET /api/models/acme/tiny/revision/v1" in hub.requests
    assert not any("run_me.py" in request or "pytorch_model.bin" in request for request in hub.requests)


def test_an_interrupted_transfer_is_retried(project: Path, hub: Hub, tiny_model: Path) -> None:
    hub.add("models/acme/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.interruptions["model.safetensors"] = 1
    edit(project, model_name="acme/tiny")
    succeed("download_model")
    transfer = f"GET /acme/tiny/resolve/{COMMIT}/model.safetensors"
    assert [request for request in hub.requests if request.startswith(transfer)] == [transfer, transfer]
    assert Path("models/base/model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_a_transfer_that_is_always_interrupted_is_an_error_and_leaves_no_partial_model(
    project: Path, hub: Hub, tiny_model: Path
) -> None:
    hub.add("models/acme/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.interruptions["model.safetensors"] = 1000
    edit(project, model_name="acme/tiny")
    message = failure(run_stage("download_model"))
    assert message.startswith(f"error: model_name: 'acme/tiny': the connection to the Hub at {hub.url} failed (")
    assert not (project / "models").exists()
    hub.interruptions.clear()
    succeed("download_model")


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """The error message of a stage that failed without a traceback."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


KINDS = pytest.mark.parametrize(("kind", "stage"), [("model", "download_model"), ("dataset", "download_dataset")])


@KINDS
def test_a_repository_that_does_not_exist_is_an_error(project: Path, hub: Hub, kind: str, stage: str) -> None:
    edit(project, **{f"{kind}_name": "acme/none"})
    assert failure(run_stage(stage)) == (
        f"error: {kind}_name: 'acme/none' is not on the Hub at {hub.url}, or it is private; "
        "check the id, or log in with `hf auth login` or set HF_TOKEN (answer: 401 Repository not found)"
    )
    assert not list((project / "data").glob("*.parquet"))


@KINDS
def test_the_error_of_a_gated_repository_says_how_to_get_access(project: Path, hub: Hub, kind: str, stage: str) -> None:
    hub.add(f"{kind}s/acme/gated", {"a.json": b"{}"})
    hub.gated.add(f"{kind}s/acme/gated")
    edit(project, **{f"{kind}_name": "acme/gated"})
    page = f"{hub.url}/{'datasets/' * (kind == 'dataset')}acme/gated"
    assert failure(run_stage(stage)) == (
        f"error: {kind}_name: 'acme/gated' is gated; accept its conditions at {page}, then log in with `hf auth login` "
        f"or set HF_TOKEN (answer: 401 Access to {kind}s/acme/gated is restricted)"
    )


@KINDS
def test_a_revision_that_does_not_exist_is_an_error(project: Path, hub: Hub, kind: str, stage: str) -> None:
    hub.add(f"{kind}s/acme/one", {"a.json": b"{}"})
    for revision, answer in (("v9", "v9"), ("fix/v9", "fix")):  # the test server knows no slashes in revisions
        edit(project, **{f"{kind}_name": "acme/one", f"{kind}_revision": revision})
        assert failure(run_stage(stage)) == (
            f"error: {kind}_name: 'acme/one' has no revision {revision!r}; "
            f"set {kind}_revision to one of its branches, tags or commits (answer: 404 Invalid rev id: {answer})"
        )


@KINDS
def test_a_failed_connection_is_an_error(project: Path, hub_port: int, kind: str, stage: str) -> None:
    edit(project, **{f"{kind}_name": "acme/one"})
    message = failure(run_stage(stage))
    assert message.startswith(
        f"error: {kind}_name: 'acme/one': the connection to the Hub at http://127.0.0.1:{hub_port} failed ("
    )
    assert message.endswith(f"); check the network and run again (finished downloads are kept), or use a local {kind}")


def test_a_split_that_does_not_exist_is_an_error(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    edit(project, dataset_name="acme/rows", dataset_split="validation")
    message = failure(run_stage("download_dataset"))
    assert message.startswith("error: dataset_name: 'acme/rows': can't be read: Unknown split \"validation\"")


def test_a_dataset_without_the_required_columns_is_an_error(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": b'{"question": "Why?", "reply": "So."}\n'})
    edit(project, dataset_name="acme/rows")
    assert failure(run_stage("download_dataset")) == (
        "error: acme/rows: column 'answer' is missing; found question, reply; "
        "every row needs 'instruction' and 'output', 'prompt' and 'completion', 'messages', or other columns that "
        "docs/data.md lists; map your column names in dataset_columns"
    )


CARD = b"""---
license: mit
configs:
- config_name: main
  data_files: main/train.jsonl
- config_name: socratic
  data_files: socratic/train.jsonl
---
"""


@pytest.mark.parametrize("max_examples", ["null", "1"])  # with a limit, the rows are streamed
def test_one_of_several_subsets_is_read(project: Path, hub: Hub, max_examples: str) -> None:
    rows = {name: f'{{"question": "{name}?", "answer": "So."}}\n'.encode() for name in ("main", "socratic")}
    hub.add("datasets/acme/rows", {"README.md": CARD, **{f"{name}/train.jsonl": row for name, row in rows.items()}})
    edit(project, dataset_name="acme/rows", dataset_subset="socratic", max_examples=max_examples)
    succeed("download_dataset")
    (found,) = pq.read_table("data/raw.parquet").to_pylist()
    assert json.loads(found["messages"])[0]["content"] == "socratic?"
    assert json.loads(Path("data/source.json").read_text())["subset"] == "socratic"
    for subset, problem in (("null", "has several subsets"), ("other", "has no subset 'other'")):
        edit(project, dataset_subset=subset)
        assert failure(run_stage("download_dataset")) == (
            f"error: dataset_name: 'acme/rows' {problem}; set its subset (dataset_subset) to one of main, socratic"
        )


def test_files_of_a_repository_are_selected_and_their_names_distinguish_the_datasets(project: Path, hub: Hub) -> None:
    rows = {f"{name}.jsonl": f'{{"question": "{name}?", "answer": "So."}}\n'.encode() for name in ("a", "b", "c")}
    hub.add("datasets/acme/rows", rows)
    datasets = "[{name: acme/rows, data_files: a.jsonl}, {name: acme/rows, data_files: '[bc].jsonl', use: test}]"
    edit(project, datasets=datasets)
    succeed("download_dataset")
    found = pq.read_table("data/raw.parquet").to_pylist()
    assert sorted((row["source"], json.loads(row["messages"])[0]["content"], row["use"]) for row in found) == [
        ("acme/rows ([bc].jsonl)", "b?", "test"),
        ("acme/rows ([bc].jsonl)", "c?", "test"),
        ("acme/rows (a.jsonl)", "a?", None),
    ]


def test_with_a_limit_only_the_rows_that_are_needed_are_transferred(project: Path, hub: Hub) -> None:
    row = b'{"question": "Why?", "answer": "' + b"So. " * 1000 + b'"}\n'
    hub.add("datasets/acme/rows", {f"{number:03}.jsonl": row * 100 for number in range(20)})
    edit(project, dataset_name="acme/rows", max_examples="150")
    succeed("download_dataset")
    transferred = {
        name for request in hub.requests for name in re.findall(r"\d{3}\.jsonl", request) if "GET" in request
    }
    assert transferred == {"000.jsonl", "001.jsonl"}


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "files",
    [
        {"rows.py": b"raise SystemExit('the script ran')"},
        {"train.pkl": b"cos\nsystem\n(S'touch owned'\ntR."},
        {"README.md": b"# only text"},
        {"train.jsonl": b'{"instruction": "\xff", "output": "b"}\n'},
        {"train.parquet": b"PAR1 not really"},
    ],
)
def test_a_dataset_of_scripts_pickles_or_damaged_files_is_rejected(
    project: Path, hub: Hub, files: dict[str, bytes]
) -> None:
    hub.add("datasets/acme/rows", files)
    edit(project, dataset_name="acme/rows")
    message = failure(run_stage("download_dataset"))
    assert message.startswith("error: dataset_name: 'acme/rows': can't be read: ")
    assert message.endswith("; use another dataset, one with JSON, CSV or Parquet files")
    assert not Path("owned").exists()


def test_an_archive_from_the_hub_cannot_write_outside_its_folder(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.zip": zipped("../../../../../../escaped.jsonl", JSONL)})
    edit(project, dataset_name="acme/rows")
    failure(run_stage("download_dataset"))
    assert list(project.parent.rglob("*escaped*")) == []


def test_a_malicious_license_from_the_hub_stays_text(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    hub.license_id = "mit |\n\n<script>\ud800\x1b[2J"
    edit(project, dataset_name="acme/rows")
    succeed("download_dataset")
    license_id = json.loads(Path("data/source.json").read_text())["license"]
    assert license_id == "mit |\n\n<script>\\ud800\\x1b[2J"


def test_a_local_folder_is_not_read_instead_of_the_hub_dataset(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    (project / "acme/rows").mkdir(parents=True)
    (project / "acme/rows/train.jsonl").write_bytes(JSONL)
    edit(project, dataset_name="acme/rows")
    assert failure(run_stage("download_dataset")) == (
        "error: dataset_name: 'acme/rows' is also a local path; rename that path, or set dataset_file to a file"
    )


def test_a_model_without_safetensors_is_rejected(project: Path, hub: Hub) -> None:
    hub.add("models/acme/old", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    edit(project, model_name="acme/old")
    assert failure(run_stage("download_model")) == (
        "error: model_name: 'acme/old' has no .safetensors weights; found pytorch_model.bin; "
        "pickles are never loaded: convert the model with its own `save_pretrained` on a machine you trust"
    )


def test_an_invalid_id_is_an_error(project: Path, hub: Hub) -> None:
    edit(project, model_name="a/b/c")
    message = failure(run_stage("download_model"))
    assert message.startswith("error: model_name: 'a/b/c' is neither a local folder nor a Hub id like owner/name: ")
