"""Malicious data and models: text stays text, and nothing from a model is executed."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from review import markup, plots
from stages import download_dataset, download_model, evaluate, format, generate, predict, split, train  # noqa: A004
from stages.data.files import write_json
from stages.engine.model_card import model_card
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit, run_pipeline

HOSTILE = [
    "<|end|>",
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "{instruction}",
    "{0.__class__}",
    "### Response:\n",
    "### Instruction:\n",
    "\x00",
    "\ud800",
    "\u202e",
    "שלום",
    "🏳️\u200d🌈",
    "\r\n",
    "\u2028",
    "e\u0301",
    "<script>alert(1)</script>",
    "| a |",
    "${model_name}",
]
text = st.lists(st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=8), max_size=6).map("".join)
rows = st.lists(st.fixed_dictionaries({"instruction": text, "input": text, "output": text}), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A project whose dataset is `data/hostile.jsonl`."""
    folder = tmp_path_factory.mktemp("hostile") / "project"
    shutil.copytree(prepared, folder)
    edit(folder, dataset_file="data/hostile.jsonl", max_length="4096")
    return folder


@settings(max_examples=40)
@given(rows=rows)
def test_any_text_reaches_the_splits_unchanged_or_its_row_is_rejected(folder: Path, rows: list[Any]) -> None:
    from transformers import AutoTokenizer

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # With a majority of rejected rows the stage would stop, and with too few rows a split would be empty.
    good = "".join(json.dumps({"instruction": f"Count to {n}.", "output": "1"}) + "\n" for n in range(60))
    (folder / "data/hostile.jsonl").write_text(lines + good)
    (folder / "data/retention.jsonl").write_text("")
    run_pipeline(folder, "download_dataset", "format", "split")
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/tokenizer")
    formatted = pq.read_table(folder / "data/formatted.parquet").to_pylist()
    rejected = pq.read_table(folder / "data/rejected.parquet").to_pylist()
    splits = [row for path in split.SPLITS.values() for row in pq.read_table(folder / path).to_pylist()]

    assert sorted(row["source_row"] for row in formatted + rejected) == list(range(1, len(rows) + 61))
    ids = {row["example_id"] for row in formatted}
    assert sorted(row["example_id"] for row in splits) == sorted(ids)
    for row in formatted:
        masked = row["labels"].count(-100)
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1  # the EOS token at the end
        assert tokenizer.decode(row["input_ids"][:masked]) == row["prompt"]
        assert tokenizer.decode(row["input_ids"][masked:-1]).strip() == row["response"]
        if row["source_row"] <= len(rows):
            source = rows[row["source_row"] - 1]
            assert tokenizer.decode(row["input_ids"][masked:-1]) == source["output"]
            assert source["instruction"] in row["prompt"]
            assert source["input"] in row["prompt"] or not source["input"].strip()
            assert row["prompt"].endswith("\n\n### Response:\n")


def test_no_stage_unpickles_anything(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a stage unpickled a file")

    shutil.copytree(prepared, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    edit(tmp_path / "project", max_new_tokens="2")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(sys, "argv", ["stage", "base"])
    for stage in (download_dataset, download_model, format, split, train, train, predict, evaluate, generate):
        stage.main()
    assert Path("models/tuned").is_dir()


CARD = MarkdownIt("commonmark", {"html": True}).enable(["table"])


@given(name=text, revision=text, license_id=text)
def test_text_from_the_hub_or_a_path_cannot_add_markup_to_the_model_card(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, name: str, revision: str, license_id: str
) -> None:
    folder = tmp_path_factory.mktemp("card")
    (folder / "models/base").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "data/train.parquet").touch()
    name, revision, license_id = (value.encode("utf-8", "replace").decode() for value in (name, revision, license_id))
    write_json(folder / "models/base/source.json", {"model_name": name, "revision": revision})
    write_json(folder / "data/source.json", {"source": name, "revision": revision, "license": license_id})
    metrics = {"examples": 1, "loss": 1.0, "validation_loss": 1.0, "best_step": 1, "steps": 1}
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        card = model_card(load_params(TrainParams, prepared / "params.yaml"), metrics)
    base_model = {"base_model": name} if revision else {}
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **base_model,
    }
    tokens = CARD.parse(ModelCard(card).text)
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or []}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "softbreak", "hardbreak"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert len([token for token in tokens if token.type == "table_open"]) == 2
    assert [token.info for token in tokens if token.type == "fence"] == ["python"]
    assert all(len(row) == 2 for row in cells(tokens))


@pytest.mark.parametrize(
    "text", ["![x](http://example.com)", "LR](data:image/png;base64,AA==)\n\n## Gates\n\n![x", '"><b>']
)
def test_the_title_of_a_plot_is_only_the_text_of_its_image(text: str) -> None:
    page = markup.page(f"{plots.as_image(text, b'PNG')}\n", "", {})
    body = page.partition("<body>")[2]
    assert re.fullmatch(r'\n<p><img src="data:image/png;base64,UE5H" alt="[^"<>]*" /></p>\n</body></html>\n', body)


def cells(tokens: list[Any]) -> list[list[str]]:
    """The cells of each table row."""
    found: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline" and found and token.level > 2:
            found[-1].append(token.content)
    return found
