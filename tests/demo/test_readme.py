"""The README, the graph and the data card agree with the files that they describe, and all pages with the user's."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, verdicts
from tests import architectures, chaos, templates
from tests.clone import ROOT
from tests.test_docs import PAGES, block, dead_links, make_targets, named_targets, read_page
from tools.start import NO_RESULTS

README = read_page("README.md")
MAX_README_LINES = 120


def metrics(path: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "metrics" / path).read_text())
    return result


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_the_results_table_matches_the_metrics() -> None:
    base, tuned = metrics("evaluate/base.json"), metrics("evaluate/tuned.json")
    rows = re.findall(r"^\| \*\*(.+?)\*\*.* \| (.+) \| (.+) \|$", block("results", README), re.MULTILINE)

    def values(key: str, digits: int, split: str = "test") -> tuple[str, str]:
        sides = (side if split == "test" else side[split] for side in (base, tuned))
        before, after = (f"{side[key]:.{digits}f}±{side[f'{key}_se']:.{digits}f}" for side in sides)
        return before, after

    assert rows == [
        ("loss", *values("loss", 3)),
        ("perplexity", *values("perplexity", 2)),
        ("token accuracy", *values("token_accuracy", 3)),
        ("pass rate", *values("pass_rate", 3)),
        ("pass rate, retention set", *values("pass_rate", 3, "retention")),
        ("exact match", *values("exact_match", 3)),
        ("ROUGE-L", *values("rouge_l", 3)),
        ("stop rate", *values("stop_rate", 3)),
        ("mean response", *values("mean_response_tokens", 1)),
        ("repetition", *values("repetition", 3)),
    ]


def test_the_output_of_the_pipeline_has_the_metrics() -> None:
    tuned = metrics("evaluate/tuned.json")
    shown = " ".join(block("repro", README).split())
    assert f"loss {tuned['loss']:.3f} ± {tuned['loss_se']:.3f}, token accuracy {tuned['token_accuracy']:.3f}" in shown
    assert f"pass rate {tuned['pass_rate']:.3f} over 76 examples with a check" in shown
    assert f"stop rate {tuned['stop_rate']:.3f}, repetition {tuned['repetition']:.3f}" in shown


def test_the_output_of_the_review_is_that_of_the_stored_report() -> None:
    report = read_page("docs/reviews/task-metrics.md").replace("\\", "")
    gates = re.findall(r"^\| (.+) \| . (passed|failed) \| (.+) \|$", report.split("\n## ")[1], re.MULTILINE)
    shown = " ".join(block("review", README).split())
    assert f"verdict {report.splitlines()[2].strip('*')} gate 1" in shown
    assert len(gates) == 4
    for number, (rule, result, found) in enumerate(gates, 1):
        assert f"gate {number} {result}: {rule}; found: {found.split(' (')[0]}" in shown
    assert f"error: {sum(result == 'failed' for _, result, _ in gates)} of 4 gates failed" in shown


def test_the_comparison_has_the_published_numbers() -> None:
    comparison = README.split("## Why this and not")[1].split("\n## ")[0]
    cells = [cell for *_, cell in templates.cells_of(templates.read_results()) if cell.trl]
    equal = sum(cell.trl == "the same" for cell in cells)
    assert f"in {len(cells)} rows of chat templates, TRL supervises the same tokens in {equal};" in comparison
    outcomes = architectures.read_results().values()
    passed = sum(not (outcome.problem or outcome.wrong) for outcome in outcomes)
    assert f"{passed} of {len(outcomes)} architectures pass" in comparison
    simulation = json.loads(verdicts.RESULTS.read_text(encoding="utf-8"))["simulation"]
    false_alarms = statistics.mean(cell["significant"]["0"] for cell in simulation)
    assert f"{false_alarms:.0%} false alarms" in comparison
    killed = json.loads(chaos.RESULTS.read_text(encoding="utf-8"))
    assert f"Killed at {sum(killed['kills'].values())} random moments" in comparison
    assert killed["problems"] == 0


def test_make_start_empties_all_results() -> None:
    assert set(re.findall(r"<!-- (\w+) -->", README)) == NO_RESULTS.keys()


def test_the_benchmark_summary_matches_the_results() -> None:
    training = json.loads(report.results_file("cpu").read_text(encoding="utf-8"))["training"]

    def ratio(engine: str, examples: str) -> str:
        engines = training[examples]["engines"]
        pairs = zip(engines[f"{engine}, bf16"]["seconds"], engines["this project, bf16"]["seconds"], strict=True)
        return f"{statistics.median([theirs / ours for theirs, ours in pairs][report.WARM_UP :]):.1f}"

    kinds = ("short", "long", "Alpaca-like")
    short, long, alpaca = (ratio("TRL", examples) for examples in kinds)
    assert (
        f"takes {short} times as long on short examples, {long} times on long and {alpaca} times on Alpaca-like ones"
    ) in README
    textbook_short, textbook_long, textbook_alpaca = (ratio("textbook", examples) for examples in kinds)
    assert f"a textbook loop in bf16 {textbook_short}, {textbook_long} and {textbook_alpaca} times" in README


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
    graph = subprocess.run([dvc, "dag", "--md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert block("dag", read_page("docs/pipeline.md")).split() == graph.split()


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
