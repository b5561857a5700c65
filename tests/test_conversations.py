"""Conversations through every stage, with a chat template whose EOS token is not that of the tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages.data.examples import read_split
from tests.clone import ROOT, copy_tree, edit, run_pipeline
from tests.test_chat_templates import jinja, with_bos

NAMES = [f"{first}{second}" for first in ("Ann", "Bob", "Cid", "Dan", "Eva", "Flo") for second in "abcdefgh"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a tokenizer like Gemma's: responses end with <end_of_turn>, other texts with <eos>."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = with_bos(["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], "<eos>")
    tokenizer.chat_template = jinja("gemma")
    tokenizer.save_pretrained(folder)
    return folder


def conversation(name: str) -> dict[str, Any]:
    texts = [f"I am {name}.", "Hi.", "Who am I?", f"{name}."]
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def run_all(project: Path, model: Path) -> None:
    """Run every stage on a mixture of conversations with two responses and Alpaca rows."""
    copy_tree(ROOT / "stages", project / "stages")
    (project / "data/mine").mkdir()
    chat = "".join(json.dumps(conversation(name)) + "\n" for name in NAMES)
    (project / "data/mine/chat.jsonl").write_text(chat)
    alpaca = "".join(json.dumps({"instruction": f"Greet {name}.", "output": "Hi."}) + "\n" for name in NAMES)
    (project / "data/mine/alpaca.jsonl").write_text(alpaca)
    edit(project, dataset_file="data/mine", datasets="[{file: chat.jsonl}, {file: alpaca.jsonl}]", template="chat")
    edit(project, model_name=str(model), validation_fraction="0.2", test_fraction="0.2", max_new_tokens="6")
    edit(project, learning_rate="1e-2", num_epochs="12", precision="fp32")
    run_pipeline(
        project,
        *("download_dataset", "download_model", "format", "split", "train", "predict@tuned"),
        *("evaluate@tuned", "generate@tuned"),
    )


def test_conversations_go_through_every_stage(
    project: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    run_all(project, chat_model)
    base, tuned = (AutoTokenizer.from_pretrained(f"models/{name}") for name in ("tokenizer", "tuned"))
    eos_token_id = base.convert_tokens_to_ids("<end_of_turn>")

    # With transformers alone, the tuned model uses the chat template and the EOS token that it was trained with.
    assert tuned.chat_template == jinja("gemma")
    assert (base.eos_token, tuned.eos_token) == ("<eos>", "<end_of_turn>")
    assert GenerationConfig.from_pretrained("models/tuned").eos_token_id == eos_token_id
    capsys.readouterr()
    exec(Path("models/tuned/README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip() == "Hi."

    # Both responses of a conversation are scored; the last one is generated, and ends with the EOS token.
    examples = read_split(Path("data/test.parquet"))
    rows = pq.read_table("data/test.parquet").to_pylist()
    answers = pq.read_table("data/predictions/tuned.parquet").to_pylist()
    found = set()
    for example, row, answer in zip(examples, rows, answers, strict=True):
        num_responses = 2 if row["source"] == "data/mine/chat.jsonl" else 1
        assert example.labels.tolist().count(eos_token_id) == num_responses
        prompt = base.decode(example.input_ids[: example.last_response])
        assert prompt == row["prompt"]
        assert prompt.endswith("<end_of_turn>\n<start_of_turn>model\n")
        assert answer["tokens"] == example.num_supervised
        assert answer["stopped"]
        found.add(num_responses)
    assert found == {1, 2}
    metrics = json.loads(Path("metrics/evaluate/tuned.json").read_text())
    parts = metrics["slices"]
    assert list(parts) == ["data/mine/alpaca.jsonl", "data/mine/chat.jsonl"]
    assert sum(part["supervised_tokens"] for part in parts.values()) == metrics["supervised_tokens"]
    assert parts["data/mine/alpaca.jsonl"]["exact_match"] == 1.0
    assert Path("metrics/samples/tuned.md").read_text().count("\n## ") == 6
