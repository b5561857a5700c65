"""The README and the data card agree with the files that they describe, and all pages with the user's files."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from stages.runtime.params import STAGES
from stages.runtime.yaml12 import parse_yaml
from tests.clone import ROOT
from tests.test_docs import PAGES, block, dead_links, make_targets, named_targets, read_page

README = read_page("README.md")
MAX_README_LINES = 250


def metrics(path: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "metrics" / path).read_text())
    return result


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < MAX_README_LINES


def test_the_results_table_matches_the_metrics() -> None:
    base, tuned = metrics("evaluate/base.json"), metrics("evaluate/tuned.json")

    def row(name: str, key: str, digits: int, split: str = "test") -> str:
        cells = []
        for each in (base, tuned):
            model = each if split == "test" else each[split]
            error = f" ± {model[f'{key}_se']:.{digits}f}" if f"{key}_se" in model else ""
            cells.append(f"{model[key]:.{digits}f}{error}")
        return f"| {name} | {cells[0]} | {cells[1]} |"

    assert block("results", README).splitlines() == [
        "| metric | base | tuned |",
        "|---|---|---|",
        row("loss (nats/token)", "loss", 3),
        row("perplexity", "perplexity", 2),
        row("token accuracy", "token_accuracy", 3),
        row("pass rate", "pass_rate", 3),
        row("pass rate, retention set", "pass_rate", 3, "retention"),
        row("exact match", "exact_match", 3),
        row("ROUGE-L", "rouge_l", 3),
        row("stop rate", "stop_rate", 3),
        row("mean response (tokens)", "mean_response_tokens", 1),
        row("repetition", "repetition", 3),
    ]


def test_the_benchmark_summary_matches_the_results() -> None:
    training = json.loads(report.results_file("cpu").read_text(encoding="utf-8"))["training"]

    def ratio(engine: str, examples: str) -> str:
        engines = training[examples]["engines"]
        pairs = zip(engines[f"{engine}, bf16"]["seconds"], engines["this project, bf16"]["seconds"], strict=True)
        return f"{statistics.median([theirs / ours for theirs, ours in pairs][report.WARM_UP :]):.1f}"

    summary = " ".join(README.split("## Benchmarks\n")[1].split("\n\n")[0].split())
    kinds = ("short", "long", "Alpaca-like")
    trl, textbook = ([ratio(engine, examples) for examples in kinds] for engine in ("TRL", "textbook"))
    assert (
        f"takes {trl[0]} times as long as here on short examples, {trl[1]} times on long and {trl[2]} times on "
        "Alpaca-like ones"
    ) in summary
    assert f"A textbook loop in bf16 takes {textbook[0]}, {textbook[1]} and {textbook[2]} times as long" in summary
    picture = report.results_file("cpu").with_suffix(".png").relative_to(ROOT)
    assert f"]({picture})" in README


def test_the_example_answers_are_in_the_samples() -> None:
    lines = block("answer", README).splitlines()
    prompt = lines[0].removeprefix("> **").removesuffix("**")
    for model in ("base", "tuned"):
        shown = [line for line in lines if line.startswith(f"> *{model}:* ")]
        assert len(shown) == 1
        answer = read_page(f"metrics/samples/{model}.md").split(f"## {prompt}\n")[1]
        words = " ".join(answer.split("\n## ")[0].split())
        assert words.startswith(shown[0].removeprefix(f"> *{model}:* ").removesuffix(" …"))


@pytest.mark.subprocess
def test_the_graph_matches_dvc_yaml() -> None:
    dvc = Path(sys.executable).with_name("dvc")
    graph = subprocess.run(
        [dvc, "dag", "--md", "evaluate@tuned"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert block("dag", README).split() == graph.split()


def test_the_stages_of_the_table_are_those_of_dvc_yaml() -> None:
    table = README.split("## How it works\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(parse_yaml(read_page("dvc.yaml"))["stages"])


def test_every_parameter_is_in_the_table() -> None:
    table = README.split("## Parameters\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", table.split("|---|---|")[1].split("\n\n")[0]))
    assert named == {name for model in STAGES for name in model.model_fields}


def test_the_numbers_of_the_data_card_are_right() -> None:
    card = " ".join(read_page("data/README.md").split())
    rows = [json.loads(line) for line in read_page("data/instructions.jsonl").splitlines()]
    assert f"`instructions.jsonl`: {len(rows):,} instruction–response pairs" in card
    assert f"{sum(bool(row['input']) for row in rows)} rows have an input" in card
    assert f"in {sum('check' in row for row in rows)} rows: a condition that a right answer meets" in card
    assert f"{len({row['kind'] for row in rows})} kinds of task" in card


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "data/README.md", *PAGES], ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    assert dead_links(page) == []


def test_the_readme_names_only_existing_make_targets() -> None:
    named = named_targets(ROOT / "README.md")
    assert named <= make_targets()
    assert {"repro", "chat", "review", "help"} <= named
