"""The Hub path with the real clients, against a small server on loopback."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.hub_server import COMMIT, Hub, serve
from tests.test_params import edit

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Add.", "input": "2, 3", "output": "5."},
    {"instruction": "Name a fish.", "input": "", "output": "Cod."},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


def run_stage(stage: str, project: Path, hub: Hub | str) -> subprocess.CompletedProcess[str]:
    """Run a stage as DVC does, in a process with an empty Hub cache."""
    url = hub if isinstance(hub, str) else hub.url
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HF_HOME": str(project / "hf"),
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    return subprocess.run([sys.executable, "-m", f"stages.{stage}"], capture_output=True, text=True, env=env)


def test_a_dataset_comes_at_its_revision_with_commit_and_licence(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    edit(project, dataset_name="acme/rows", dataset_revision="v1", max_examples="2")
    result = run_stage("download_dataset", project, hub)
    assert result.returncode == 0, result.stderr
    rows = pq.read_table("data/raw.parquet").to_pylist()
    assert [(row["source"], row["source_row"], row["messages"][1]["content"], row["input"]) for row in rows] == [
        ("acme/rows", 1, "Red.", ""),
        ("acme/rows", 2, "5.", "2, 3"),
    ]
    assert json.loads(Path("data/source.json").read_text()) == {
        "source": "acme/rows",
        "split": "train",
        "revision": COMMIT,
        "licence": "cc0-1.0",
        "rows": 2,
    }
    assert "GET /api/datasets/acme/rows/revision/v1" in hub.requests
    assert any(f"/datasets/acme/rows/resolve/{COMMIT}/train.jsonl" in request for request in hub.requests)


def test_a_model_comes_at_its_revision(project: Path, hub: Hub, tiny_model: Path) -> None:
    hub.add("models/acme/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.add("models/acme/tiny", {"run_me.py": b"raise SystemExit", "pytorch_model.bin": b"a pickle"})
    edit(project, model_name="acme/tiny", model_revision="v1")
    result = run_stage("download_model", project, hub)
    assert result.returncode == 0, result.stderr
    assert json.loads(Path("models/base/source.json").read_text()) == {"model_name": "acme/tiny", "revision": COMMIT}
    assert (project / "models/base/model.safetensors").stat().st_size > 0
    assert (project / "models/tokenizer/tokenizer.json").is_file()
    assert "GET /api/models/acme/tiny/revision/v1" in hub.requests
    assert not any("run_me.py" in request or "pytorch_model.bin" in request for request in hub.requests)


def test_a_transfer_that_breaks_half_way_is_taken_up_again(project: Path, hub: Hub, tiny_model: Path) -> None:
    hub.add("models/acme/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.breaks["model.safetensors"] = 1
    edit(project, model_name="acme/tiny")
    result = run_stage("download_model", project, hub)
    assert result.returncode == 0, result.stderr
    transfer = f"GET /acme/tiny/resolve/{COMMIT}/model.safetensors"
    assert [request for request in hub.requests if request.startswith(transfer)] == [transfer, transfer]
    assert Path("models/base/model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_a_transfer_that_always_breaks_leaves_a_message_and_no_half_model(
    project: Path, hub: Hub, tiny_model: Path
) -> None:
    hub.add("models/acme/tiny", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    hub.breaks["model.safetensors"] = 1000
    edit(project, model_name="acme/tiny")
    message = failure(run_stage("download_model", project, hub))
    assert message.startswith(f"error: model_name: 'acme/tiny': the Hub at {hub.url} can't be reached or broke off (")
    assert not (project / "models").exists()
    hub.breaks.clear()
    assert run_stage("download_model", project, hub).returncode == 0


def failure(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_a_dataset_that_does_not_exist(project: Path, hub: Hub) -> None:
    edit(project, dataset_name="acme/none")
    assert failure(run_stage("download_dataset", project, hub)) == (
        f"error: dataset_name: 'acme/none' is not on the Hub at {hub.url}, or it is private; "
        "check the id, or log in with `hf auth login` or HF_TOKEN"
    )
    assert not (project / "data/raw.parquet").exists()


def test_a_model_that_does_not_exist(project: Path, hub: Hub) -> None:
    edit(project, model_name="acme/none")
    assert failure(run_stage("download_model", project, hub)) == (
        f"error: model_name: 'acme/none' is not on the Hub at {hub.url}, or it is private; "
        "check the id, or log in with `hf auth login` or HF_TOKEN"
    )


@pytest.mark.parametrize(("kind", "stage"), [("model", "download_model"), ("dataset", "download_dataset")])
def test_a_gated_repository(project: Path, hub: Hub, kind: str, stage: str) -> None:
    hub.add(f"{kind}s/acme/gated", {"a.json": b"{}"})
    hub.gated.add(f"{kind}s/acme/gated")
    edit(project, **{f"{kind}_name": "acme/gated"})
    assert failure(run_stage(stage, project, hub)) == (
        f"error: {kind}_name: 'acme/gated' is gated; accept its conditions at {hub.url}/acme/gated, "
        "then log in with `hf auth login` or set HF_TOKEN"
    )


@pytest.mark.parametrize(("kind", "stage"), [("model", "download_model"), ("dataset", "download_dataset")])
def test_a_revision_that_does_not_exist(project: Path, hub: Hub, kind: str, stage: str) -> None:
    hub.add(f"{kind}s/acme/one", {"a.json": b"{}"})
    edit(project, **{f"{kind}_name": "acme/one", f"{kind}_revision": "v9"})
    assert failure(run_stage(stage, project, hub)) == (
        f"error: {kind}_name: 'acme/one' has no revision 'v9'; "
        f"set {kind}_revision to one of its branches, tags or commits"
    )


@pytest.mark.parametrize(("kind", "stage"), [("model", "download_model"), ("dataset", "download_dataset")])
def test_no_network(project: Path, kind: str, stage: str) -> None:
    edit(project, **{f"{kind}_name": "acme/one"})
    message = failure(run_stage(stage, project, "http://127.0.0.1:9"))
    assert message.startswith(
        f"error: {kind}_name: 'acme/one': the Hub at http://127.0.0.1:9 can't be reached or broke"
    )
    assert message.endswith(f"check the network and run again (what came over is kept), or use a local {kind}")


def test_a_split_that_does_not_exist(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    edit(project, dataset_name="acme/rows", dataset_split="validation")
    message = failure(run_stage("download_dataset", project, hub))
    assert message.startswith("error: dataset_name: 'acme/rows': can't be read: Unknown split \"validation\"")


def test_a_dataset_without_the_columns(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": b'{"question": "Why?", "answer": "So."}\n'})
    edit(project, dataset_name="acme/rows")
    assert failure(run_stage("download_dataset", project, hub)) == (
        "error: acme/rows: column 'instruction' is missing; found question, answer; "
        "every row needs 'instruction' and 'output' (and may have 'input'), or 'prompt' and 'completion', all text, "
        "or 'messages'"
    )


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
        {"README.md": b"# nothing but words"},
        {"train.jsonl": b'{"instruction": "\xff", "output": "b"}\n'},
        {"train.parquet": b"PAR1 not really"},
    ],
)
def test_a_dataset_of_scripts_pickles_or_damaged_files_is_refused(
    project: Path, hub: Hub, files: dict[str, bytes]
) -> None:
    hub.add("datasets/acme/rows", files)
    edit(project, dataset_name="acme/rows")
    message = failure(run_stage("download_dataset", project, hub))
    assert message.startswith("error: dataset_name: 'acme/rows': can't be read: ")
    assert message.endswith("; use another dataset, one with JSON, CSV or Parquet files")
    assert not Path("owned").exists()


def test_an_archive_of_the_hub_can_not_write_outside_its_folder(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.zip": zipped("../../../../../../escaped.jsonl", JSONL)})
    edit(project, dataset_name="acme/rows")
    failure(run_stage("download_dataset", project, hub))
    assert list(project.parent.rglob("*escaped*")) == []


def test_a_hostile_licence_of_the_hub_stays_text(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    hub.licence = "mit |\n\n<script>\ud800\x1b[2J"
    edit(project, dataset_name="acme/rows")
    assert run_stage("download_dataset", project, hub).returncode == 0
    licence = json.loads(Path("data/source.json").read_text())["licence"]
    assert licence == "mit |\n\n<script>\\ud800\\x1b[2J"


def test_a_local_folder_is_not_read_in_place_of_the_hubs_dataset(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/rows", {"train.jsonl": JSONL})
    (project / "acme/rows").mkdir(parents=True)
    (project / "acme/rows/train.jsonl").write_bytes(JSONL)
    edit(project, dataset_name="acme/rows")
    assert failure(run_stage("download_dataset", project, hub)) == (
        "error: dataset_name: 'acme/rows' is also a path here; rename that, or name a file in dataset_file"
    )


def test_a_model_without_safetensors(project: Path, hub: Hub) -> None:
    hub.add("models/acme/old", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    edit(project, model_name="acme/old")
    assert failure(run_stage("download_model", project, hub)) == (
        "error: model_name: 'acme/old' has no .safetensors weights; found pytorch_model.bin; "
        "pickles are never loaded: convert the model with its own `save_pretrained` on a machine you trust"
    )


def test_an_id_that_can_not_be_one(project: Path, hub: Hub) -> None:
    edit(project, model_name="a/b/c")
    message = failure(run_stage("download_model", project, hub))
    assert message.startswith("error: model_name: 'a/b/c' is neither a folder here nor a Hub id like owner/name: ")
