"""Conversations through every stage: a chat template whose turns don't end with the tokenizer's own end token."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import download_dataset, download_model, evaluate, format, generate, split, train  # noqa: A004
from stages.shared.examples import read_split
from tests.test_chat_templates import jinja, with_bos
from tests.test_params import edit

NAMES = [f"{first}{second}" for first in ("Ann", "Bob", "Cid", "Dan", "Eva", "Flo") for second in "abcdefgh"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a tokenizer as Gemma's: answers end with <end_of_turn>, texts with <eos>."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = with_bos(["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], "<eos>")
    tokenizer.chat_template = jinja("gemma")
    tokenizer.save_pretrained(folder)
    return folder


def conversation(name: str) -> dict[str, Any]:
    texts = [f"I am {name}.", "Hi.", "Who am I?", f"{name}."]
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def run_all(project: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    for name in ("stages", "templates"):
        shutil.copytree(root / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "data/mine").mkdir()
    chat = "".join(json.dumps(conversation(name)) + "\n" for name in NAMES)
    (project / "data/mine/chat.jsonl").write_text(chat)
    alpaca = "".join(json.dumps({"instruction": f"Greet {name}.", "output": "Hi."}) + "\n" for name in NAMES)
    (project / "data/mine/alpaca.jsonl").write_text(alpaca)
    edit(project, dataset_file="data/mine", datasets="[{file: chat.jsonl}, {file: alpaca.jsonl}]", template="chat")
    edit(project, model_name=str(model), validation_fraction="0.2", test_fraction="0.2", max_new_tokens="6")
    edit(project, learning_rate="1e-2", num_epochs="8", precision="fp32")
    for stage in (download_dataset, download_model, format, split, train):
        stage.main()
    monkeypatch.setattr(sys, "argv", ["stage", "tuned"])
    for last in (evaluate, generate):
        last.main()


def test_conversations_go_through_every_stage(
    project: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    run_all(project, chat_model, monkeypatch)
    base, tuned = (AutoTokenizer.from_pretrained(f"models/{name}") for name in ("tokenizer", "tuned"))
    end = base.convert_tokens_to_ids("<end_of_turn>")

    # The tuned model asks and stops as it was trained, with plain transformers.
    assert tuned.chat_template == jinja("gemma")
    assert (base.eos_token, tuned.eos_token) == ("<eos>", "<end_of_turn>")
    assert GenerationConfig.from_pretrained("models/tuned").eos_token_id == end
    capsys.readouterr()
    exec(Path("models/tuned/README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip() == "Hi."

    # Both answers of a conversation are scored; the last is generated, and stops at the end of its turn.
    examples = read_split(Path("data/test.parquet"))
    rows = pq.read_table("data/test.parquet").to_pylist()
    answers = pq.read_table("data/predictions/tuned.parquet").to_pylist()
    kinds = set()
    for example, row, answer in zip(examples, rows, answers, strict=True):
        turns = 2 if row["source"] == "data/mine/chat.jsonl" else 1
        assert example.labels.tolist().count(end) == turns
        asked = base.decode(example.input_ids[: example.last_response])
        assert asked == row["prompt"]
        assert asked.endswith("<end_of_turn>\n<start_of_turn>model\n")
        assert answer["tokens"] == example.num_supervised
        assert answer["stopped"]
        kinds.add(turns)
    assert kinds == {1, 2}
    metrics = json.loads(Path("metrics/evaluate/tuned.json").read_text())
    parts = metrics["sources"]
    assert list(parts) == ["data/mine/alpaca.jsonl", "data/mine/chat.jsonl"]
    assert sum(part["supervised_tokens"] for part in parts.values()) == metrics["supervised_tokens"]
    assert parts["data/mine/alpaca.jsonl"]["exact_match"] == 1.0
    assert Path("metrics/samples/tuned.md").read_text().count("\n## ") == 6
