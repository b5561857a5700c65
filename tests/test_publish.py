"""`make publish` with the real Hub client and the local server."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from stages.data.files import write_json, write_text
from stages.runtime.errors import UserError
from stages.runtime.yaml12 import parse_yaml
from tests.clone import copy_clone
from tests.hub_server import Hub
from tools import publish


@pytest.fixture
def clone(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_clone(ran, tmp_path / "clone"))
    return tmp_path / "clone"


def run_publish(repo: str = "acme/tiny") -> None:
    with pytest.MonkeyPatch.context() as context:
        context.setattr("sys.argv", ["publish", repo])
        publish.main()


@pytest.mark.subprocess
def test_the_model_its_card_and_its_metrics_are_uploaded_in_one_commit(
    clone: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.owners = {"acme"}
    run_publish()
    printed = capsys.readouterr().out
    uploaded = hub.root / "models/acme/tiny"
    names = {str(path.relative_to(uploaded)) for path in uploaded.rglob("*") if path.is_file()}
    expected = {path.name for path in (clone / "models/tuned").iterdir()} | {"params.yaml", "dvc.lock", ".visibility"}
    metrics = {"evaluate/base.json", "evaluate/tuned.json", "format.json", "split.json", "train.json"}
    assert names == expected | {f"metrics/{name}" for name in metrics}
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (uploaded / name).read_bytes() == (clone / "models/tuned" / name).read_bytes()
    assert (uploaded / ".visibility").read_text() == "private"
    card = ModelCard.load(uploaded / "README.md")
    assert card.text.count("| test set, 8 examples | loss (nats/token) | ") == 1
    assert card.text.count("| retention set, 6 examples | pass rate | ") == 1
    loss = json.loads((clone / "metrics/evaluate/tuned.json").read_text())["loss"]
    assert card.data.model_name == "acme/tiny"
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results["test set, 8 examples", "loss"] == loss
    assert [request for request in hub.requests if "/commit/" in request] == ["POST /api/models/acme/tiny/commit/main"]
    assert f"uploaded  {len(names) - 1} files to {hub.url}/acme/tiny" in printed
    shutil.rmtree("models")
    exec(card.text.split("```python\n")[1].split("```")[0], {})  # loads the model from the Hub
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(("repository", "license_id"), [("acme/base", "cc0-1.0"), ("acme/deleted", None)])
def test_the_card_has_the_license_of_a_base_model_that_is_on_the_hub(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, repository: str, license_id: str | None
) -> None:
    hub.add("models/acme/base", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    write_text(Path("models/tuned/README.md"), f"---\nbase_model: {repository}\n---\n# Tuned\n")
    write_json(Path("data/source.json"), {"source": "a.jsonl"})
    for name in ("base", "tuned"):
        write_json(Path(f"metrics/evaluate/{name}.json"), {"loss": 1.5, "examples": 3})
    assert publish.card("acme/tiny", HfApi()).data.license == license_id


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("", "REPO is empty; name a model of yours on the Hub: make publish REPO=owner/name"),
        ("a/b/c", "REPO: 'a/b/c' must be an id like owner/name: "),
        (
            "other/tiny",
            "REPO: 'other/tiny' can't be written with this token; log in with `hf auth login` or set HF_TOKEN",
        ),
    ],
)
def test_a_repository_that_can_not_be_written_is_reported(clone: Path, hub: Hub, repo: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        run_publish(repo)
    assert str(error.value).startswith(message)


@pytest.mark.subprocess
@pytest.mark.usefixtures("hub_port")
def test_without_a_connection_nothing_is_published(clone: Path) -> None:
    with pytest.raises(UserError, match=r"^REPO: 'acme/tiny': the connection to the Hub at .* failed \(.*refused"):
        run_publish()


def train_again(lock: dict[str, Any]) -> None:
    (model,) = [out for out in lock["stages"]["train"]["outs"] if out["path"] == "models/tuned"]
    model["md5"] = "0" * 32 + ".dir"


def predict_again(lock: dict[str, Any]) -> None:
    lock["stages"]["predict@tuned"]["outs"][0]["md5"] = "0" * 32


def check_out_another_model(lock: dict[str, Any]) -> None:
    Path("models/tuned/config.json").write_text("{}")


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("change", "stages"),
    [(train_again, "train"), (predict_again, "predict@tuned"), (check_out_another_model, "train, predict@tuned")],
)
def test_a_model_whose_metrics_are_of_another_one_is_refused(
    clone: Path, change: Callable[[dict[str, Any]], None], stages: str
) -> None:
    lock = parse_yaml(Path("dvc.lock").read_text())
    change(lock)
    Path("dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    with pytest.raises(UserError) as error:
        run_publish()
    message = f"models/tuned: {stages} changed since they ran, or their results did; run `dvc repro`"
    assert str(error.value) == message
