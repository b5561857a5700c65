"""The pages of the documentation agree with the code and the published measurements. The README: tests/demo."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from stages.engine.batches import MAX_LOGITS
from stages.runtime.params import STAGES
from stages.runtime.yaml12 import parse_yaml
from tests import architectures, chaos, templates
from tests.clone import ROOT

PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "LICENSES.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of the user, so a project may lack them.
USER_FILES = ("README.md", "data/", "docs/reviews", "gates.yaml", "must_pass.yaml", "scorers.py")


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def block(name: str, page: str) -> str:
    """The text between the markers of a generated block."""
    match = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", page, re.DOTALL)
    assert match
    return match[1]


def test_the_benchmark_tables_match_the_results() -> None:
    page = read_page("docs/benchmarks.md")
    for name, device in (("bench", "cpu"), ("bench-cuda", "cuda")):
        path = report.results_file(device)
        assert block(name, page) == report.table(json.loads(path.read_text(encoding="utf-8")))
    picture = report.results_file("cpu").with_suffix(".png").relative_to(ROOT)
    assert f"](../{picture})" in page


def test_the_chaos_table_matches_the_results() -> None:
    results = json.loads(chaos.RESULTS.read_text(encoding="utf-8"))
    assert block("chaos", read_page("docs/reliability.md")) == chaos.table(results)


def test_the_table_of_architectures_matches_the_results() -> None:
    assert block("architectures", read_page("docs/models.md")) == architectures.table(architectures.read_results())


def test_the_table_of_templates_matches_the_results() -> None:
    assert block("templates", read_page("docs/templates.md")) == templates.table(templates.read_results())


def test_the_page_on_the_pipeline_lists_every_stage() -> None:
    table = read_page("docs/pipeline.md").split("\n\n")[2]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(parse_yaml(read_page("dvc.yaml"))["stages"])


def test_the_page_on_parameters_lists_every_parameter_once() -> None:
    table = read_page("docs/parameters.md").split("\n\n")[2]
    parameters = {name for model in STAGES for name in model.model_fields}
    assert sorted(re.findall(r"`([a-z_]+)`", table)) == sorted(parameters)


def test_the_page_on_parameters_has_the_limits_of_a_micro_batch() -> None:
    cpu, mps, cuda = (f"{MAX_LOGITS[device] / 1e6:.0f} million" for device in ("cpu", "mps", "cuda"))
    page = " ".join(read_page("docs/parameters.md").split())
    assert cpu == mps
    assert f"{cpu} logits (supervised tokens × vocabulary) on CPUs and Apple GPUs, or {cuda} on NVIDIA GPUs" in page


def test_the_page_on_several_gpus_names_the_stages_that_the_launcher_starts() -> None:
    stages = parse_yaml(read_page("dvc.yaml"))["stages"]
    started = {name for name, stage in stages.items() if stage["cmd"].startswith("${launcher} ")}
    sentence = read_page("docs/distributed.md").split("stages with a model: ")[1].split(".")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == started


def test_the_table_of_reasons_lists_every_reason() -> None:
    table = read_page("docs/data.md").split("| reason | meaning |\n")[1].split("\n\n")[0]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "stages").rglob("*.py")]
    reasons = {reason for source in sources for reason in re.findall(r'BadRowError\(\s*"(\w+)"', source)}
    assert len(reasons) > 20
    assert reasons <= set(re.findall(r"`(\w+)`", table))


def test_the_map_of_changes_names_existing_files() -> None:
    table = read_page("CONTRIBUTING.md").split("## Where do I change …\n")[1].split("\n\n")[0]
    files = re.findall(r"^\| .+ \| `(.+)` \|$", table, re.MULTILINE)
    assert len(files) == len(table.splitlines()) - 2
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_code_layout_lists_every_module() -> None:
    tree = read_page("CONTRIBUTING.md").split("## Code layout\n```\n")[1].split("\n```")[0]
    listed, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            listed.add(folder + name)
        else:
            folder = name
    modules = {
        str(path.relative_to(ROOT))
        for package in ("stages", "tools", "review")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == modules


def test_every_page_is_in_the_index() -> None:
    index = read_page("docs/README.md")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"^\| \[[^]]+\]\((.+?)\) \|", index, re.MULTILINE)) == pages


def dead_links(page: Path) -> list[str]:
    """The relative links that name no file, or no heading of it; as paths in the project."""
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^):]+)\)", text), *re.findall(r'<img src="([^":]+)"', text)]
    dead = [link for link in links if not leads_somewhere(page, link)]
    return [os.path.relpath(page.parent / link, ROOT) for link in dead]


def leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists() or not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.+)", target.read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    assert [link for link in dead_links(page) if not link.startswith(USER_FILES)] == []


@pytest.mark.subprocess
def test_make_help_lists_every_target() -> None:
    makefile = read_page("Makefile")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in shown.splitlines()] == targets
    phony = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    assert sorted(phony[0].split()) == sorted(targets)


def test_the_documentation_names_only_existing_make_targets() -> None:
    named = {name for page in PAGES for name in named_targets(page)}
    assert named <= make_targets()
    assert {"repro", "review", "test"} <= named


def make_targets() -> set[str]:
    return {*re.findall(r"^([a-z-]+):", read_page("Makefile"), re.MULTILINE), ".venv/installed"}


def named_targets(page: Path) -> set[str]:
    return set(re.findall(r"(?:^|`)make ([a-z./-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
