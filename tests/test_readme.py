"""What the README says is what the files say."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import report
from tests import chaos

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", README, re.DOTALL)
    assert match
    return match[1]


def metrics(path: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "metrics" / path).read_text())
    return result


def test_the_table_of_results_is_that_of_the_metrics() -> None:
    base, tuned = metrics("evaluate/base.json"), metrics("evaluate/tuned.json")

    def row(name: str, key: str, digits: int) -> str:
        cells = []
        for model in (base, tuned):
            error = f" ± {model[f'{key}_se']:.{digits}f}" if f"{key}_se" in model else ""
            cells.append(f"{model[key]:.{digits}f}{error}")
        return f"| {name} | {cells[0]} | {cells[1]} |"

    assert section("results").splitlines() == [
        "| metric | base | tuned |",
        "|---|---|---|",
        row("loss, nats a token", "loss", 3),
        row("perplexity", "perplexity", 2),
        row("token accuracy", "token_accuracy", 3),
        row("exact match", "exact_match", 3),
        row("ROUGE-L", "rouge_l", 3),
        row("stop rate", "stop_rate", 3),
        row("mean response, tokens", "mean_response_tokens", 1),
        row("distinct-2", "distinct_2", 3),
    ]


def test_the_table_of_speed_is_that_of_the_benchmarks() -> None:
    results = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert section("bench") == report.table(results)
    assert f"]({report.PICTURE.relative_to(ROOT)})" in README


def test_the_table_of_chaos_is_that_of_its_results() -> None:
    assert section("chaos") == chaos.table(json.loads(chaos.RESULTS.read_text(encoding="utf-8")))


def test_the_answers_shown_are_in_the_samples() -> None:
    lines = section("answer").splitlines()
    prompt = lines[0].removeprefix("> **").removesuffix("**")
    for model in ("base", "tuned"):
        shown = [line for line in lines if line.startswith(f"> *{model}:* ")]
        assert len(shown) == 1
        answer = (ROOT / f"metrics/samples/{model}.md").read_text(encoding="utf-8").split(f"## {prompt}\n")[1]
        words = " ".join(answer.split("\n## ")[0].split())
        assert words.startswith(shown[0].removeprefix(f"> *{model}:* ").removesuffix(" …"))


def test_the_graph_is_the_pipelines() -> None:
    dvc = Path(sys.executable).with_name("dvc")
    graph = subprocess.run([dvc, "dag", "--md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert section("dag").split() == graph.split()


def test_every_file_of_the_pipeline_is_in_the_file_tree() -> None:
    tree = section_of_files()
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "stages").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(line.split()[0] for line in tree if line.startswith("stages/")) == sorted(files)


def test_links_lead_to_files_that_are_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def section_of_files() -> list[str]:
    return README.split("## Files\n```\n")[1].split("\n```")[0].splitlines()


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in shown.splitlines()] == targets
    phony = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    assert sorted(phony[0].split()) == sorted(targets)


def test_every_parameter_is_in_the_table() -> None:
    from stages.shared.params import STAGES

    table = README.split("## Parameters")[1].split("## The pipeline")[0]
    named = set(re.findall(r"`([a-z_]+)`", table.split("|---|---|")[1].split("\n\n")[0]))
    assert named == {name for model in STAGES for name in model.model_fields}


def test_the_data_card_counts_right() -> None:
    card = (ROOT / "data/README.md").read_text()
    lines = (ROOT / "data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert f"`instructions.jsonl`: {len(rows):,} instruction–response pairs" in card
    assert f"{sum(bool(row['input']) for row in rows)} rows have an input" in card
    assert f"in {sum('check' in row for row in rows)} rows: a Python expression" in card
    assert f"{len({row['kind'] for row in rows})} kinds of task" in card
