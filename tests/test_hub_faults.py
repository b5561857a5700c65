"""Faults of the Hub and the network, and downloads that are already in the cache."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import HF_HOME
from tests.clone import ROOT, edit
from tests.fork_server import run_forked
from tests.hub_server import COMMIT, Hub
from tests.test_hub import CARD, JSONL, empty_cache, failure

pytestmark = [pytest.mark.subprocess, pytest.mark.usefixtures("fast_stages")]
HTML = {"Content-Type": "text/html; charset=utf-8"}
# Status, headers and body of an answer, and what the message says.
FAULTS = {
    "gated, not logged in": (401, {"X-Error-Code": "GatedRepo"}, b"", "is gated; accept its conditions at "),
    "gated, not accepted": (403, {"X-Error-Code": "GatedRepo"}, b"", "is gated; accept its conditions at "),
    "no login": (401, {}, b"", "can't be read without a token; accept the conditions at "),
    "no permission": (403, {}, b"", "can't be read without a token; accept the conditions at "),
    "disabled": (
        403,
        {"X-Error-Message": "Access to this resource is disabled."},
        b"",
        "the Hub refused the request; see",
    ),
    "file is gone": (404, {"X-Error-Code": "EntryNotFound"}, b"", "has lost a file or a commit; see "),
    "commit is gone": (
        404,
        {"X-Error-Code": "RevisionNotFound"},
        b"",
        "changed during the download, its commit is gone",
    ),
    "legal reasons": (451, {}, b"", "the Hub refused the request; see "),
    "proxy login": (407, {}, b"", "the proxy asks for a login; put it into HTTPS_PROXY or HTTP_PROXY"),
    "too many requests": (
        429,
        {"Retry-After": "77"},
        b"",
        "the Hub got too many requests; wait 77 seconds and run again",
    ),
    "Hub fault": (500, {}, b"[]", "the Hub has a fault; wait some minutes and run again"),
    "Hub is overloaded": (503, HTML, b"<p>Busy", "the Hub has a fault; wait some minutes and run again"),
    "login page": (
        200,
        HTML,
        b"<p>Log in",
        "is a web page, such as the login page of a proxy); log in to the network, or",
    ),
    "redirect": (302, {"Location": "/login"}, b"", "is a web page, such as the login page of a proxy); log in to the "),
}
# Without the waiting between retries, which are warnings on the terminal.
RUN = """
import runpy, time
from huggingface_hub import constants
time.sleep = lambda seconds: None
constants.HF_HUB_OFFLINE, timeout = {offline}, {timeout}
constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = timeout
runpy.run_module("stages.{stage}", run_name="__main__", alter_sys=True)
"""
SNAPSHOT = """
from huggingface_hub import snapshot_download
snapshot_download("acme/it", repo_type="{repo_type}", revision="{commit}", allow_patterns={patterns})
"""


@pytest.fixture(autouse=True)
def _new_cache(hub_port: int) -> None:
    empty_cache()


def run_stage(stage: str, offline: bool = False, timeout: float = 5) -> subprocess.CompletedProcess[str]:
    code = RUN.format(stage=stage, offline=offline, timeout=timeout)
    return run_python(code)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return run_forked(Path.cwd(), ["-c", code], {**os.environ, "PYTHONPATH": str(ROOT)})


def prepare(project: Path, hub: Hub, tiny_model: Path, kind: str, revision: str = "null") -> str:
    """Add a model or dataset to the Hub, and choose it. Returns the stage that downloads it."""
    if kind == "model":
        hub.add("models/acme/it", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
        edit(project, model_name="acme/it", model_revision=revision)
        return "download_model"
    hub.add("datasets/acme/it", {"README.md": b"---\nlicense: cc0-1.0\n---\n", "train.jsonl": JSONL})
    limit = "2" if kind == "stream" else "null"
    edit(project, dataset_name="acme/it", dataset_revision=revision, max_examples=limit)
    return "download_dataset"


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("model", "/api/"),
        ("model", "/resolve/"),
        ("dataset", "/api/"),
        ("dataset", "/resolve/"),
        ("dataset", "train.jsonl"),
        ("stream", "train.jsonl"),
    ],
)
def test_a_fault_of_the_hub_is_named(project: Path, hub: Hub, tiny_model: Path, kind: str, part: str) -> None:
    stage = prepare(project, hub, tiny_model, kind)
    hub.faults["/login"] = (200, HTML, b"<p>Log in")
    names = FAULTS if part != "train.jsonl" else ("no permission", "commit is gone", "too many requests", "login page")
    for name in names:  # the data of datasets is read by another client, which is slower
        status, headers, body, message = FAULTS[name]
        hub.faults[part] = (status, headers, body)
        found = failure(run_stage(stage))
        assert message in found, name
        assert ": 'acme/it'" in found
        assert "JSON, CSV or Parquet" not in found
        empty_cache()


def test_a_fault_in_the_middle_of_a_stream_is_named(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/it", {f"{number}.jsonl": JSONL * 100 for number in range(3)})
    hub.faults["2.jsonl"] = (503, {}, b'{"error": "Back at noon"}')
    edit(project, dataset_name="acme/it", max_examples="700")
    assert failure(run_stage("download_dataset")).endswith(
        "can't be read now: the Hub has a fault; wait some minutes and run again (finished downloads are kept) "
        "(answer: 503 Back at noon)"
    )


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_silent_hub_is_noticed_after_its_timeout(project: Path, hub: Hub, tiny_model: Path, kind: str) -> None:
    stage = prepare(project, hub, tiny_model, kind, COMMIT)
    hub.faults["/api/"] = (0, {}, b"")
    message = failure(run_stage(stage, timeout=0.2))
    assert f"the connection to the Hub at {hub.url} failed (timed out); check the network" in message
    assert len([request for request in hub.requests if "/api/" in request]) == 1


@pytest.mark.parametrize("stage", ["download_model", "download_dataset"])
@pytest.mark.parametrize("source", ["HF_TOKEN", "file"])
def test_a_token_that_is_refused_or_damaged_is_named_but_not_shown(
    project: Path, hub: Hub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, stage: str, source: str
) -> None:
    prepare(project, hub, tiny_model, stage.removeprefix("download_"))
    expected = "HF_TOKEN" if source == "HF_TOKEN" else f"`hf auth login` ({HF_HOME}/token)"
    for token, said in (
        ("hf_expired", f"the Hub refused the token of {expected}"),
        ("hf_ü", f"the token of {expected} has"),
    ):
        if source == "HF_TOKEN":
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            Path(HF_HOME, "token").write_text(f"{token}\n", encoding="utf-8")
        hub.faults["/api/"] = (401, {}, json.dumps({"error": f"{token} is expired\x1b"}).encode())
        result = run_stage(stage)
        assert said in failure(result)
        assert token not in result.stderr
        assert "\x1b" not in result.stderr


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("revision", [COMMIT, "v1"])
def test_a_download_is_loaded_from_the_cache_without_a_network(
    project: Path, hub: Hub, tiny_model: Path, kind: str, revision: str
) -> None:
    stage = prepare(project, hub, tiny_model, kind, revision)
    results = Path("models/base" if kind == "model" else "data")
    names = ["source.json", "model.safetensors" if kind == "model" else "raw.parquet"]
    assert run_stage(stage).returncode == 0
    online = [(results / name).read_bytes() for name in names]
    requests = len(hub.requests)
    hub.faults["/"] = (500, {}, b"")
    assert run_stage(stage, offline=True).returncode == 0
    assert [(results / name).read_bytes() for name in names] == online
    assert len(hub.requests) == requests
    if revision == COMMIT:  # also if the Hub can't be reached
        assert run_stage(stage).returncode == 0
        assert len(hub.requests) == requests
    else:
        assert "the Hub has a fault" in failure(run_stage(stage))


@pytest.mark.parametrize("kind", ["model", "dataset", "stream"])
def test_a_snapshot_is_loaded_without_a_network_only_if_it_is_complete(
    project: Path, hub: Hub, tiny_model: Path, kind: str
) -> None:
    stage = prepare(project, hub, tiny_model, kind, COMMIT)
    repo_type = "model" if kind == "model" else "dataset"
    for patterns, complete in ((["*.md", "config.json"], False), (None, True)):
        run_python(SNAPSHOT.format(repo_type=repo_type, commit=COMMIT, patterns=patterns))
        result = run_stage(stage, offline=True)
        if complete:
            assert result.returncode == 0, result.stderr
        else:
            assert "is not complete in the cache" in failure(result)
    source = json.loads(Path("models/base/source.json" if kind == "model" else "data/source.json").read_text())
    assert source["revision"] == COMMIT
    assert source.get("license") == (None if kind == "model" else "cc0-1.0")


def test_another_subset_in_the_cache_is_not_loaded_instead(project: Path, hub: Hub) -> None:
    hub.add("datasets/acme/it", {"README.md": CARD, **{f"{name}/train.jsonl": JSONL for name in ("main", "socratic")}})
    edit(project, dataset_name="acme/it", dataset_subset="main", dataset_revision=COMMIT)
    assert run_stage("download_dataset").returncode == 0
    for subset in ("socratic", "null"):
        edit(project, dataset_subset=subset)
        assert "is not complete in the cache" in failure(run_stage("download_dataset", offline=True))
        hub.faults["/resolve/"] = (500, {}, b"")
        failure(run_stage("download_dataset"))
