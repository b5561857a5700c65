"""`dvc.yaml` says what the code does: its dependencies and parameters equal what the stages import and read."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.shared import params as params_module

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
NAMES = list(STAGES)


def imported_files(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """The project's modules that a file imports, at any place in it and through others, itself included."""
    seen = set() if seen is None else seen
    if path in seen:
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            file = Path(*module.split(".")).with_suffix(".py")
            if module.startswith("stages.") and (ROOT / file).is_file():
                imported_files(file, seen)
    return seen


def test_the_pipeline_has_these_stages() -> None:
    assert NAMES == ["download_dataset", "download_model", "format", "split", "train", "evaluate", "generate"]
    assert STAGES["evaluate"]["matrix"] == STAGES["generate"]["matrix"] == {"model": ["base", "tuned"]}
    assert all(stage["desc"] for stage in STAGES.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_depends_on_the_modules_that_it_imports(name: str) -> None:
    declared = {dep for dep in STAGES[name]["deps"] if dep.startswith("stages/")}
    assert declared == {str(file) for file in imported_files(Path(f"stages/{name}.py"))}


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_declares_the_parameters_that_its_model_has_and_its_code_reads(name: str) -> None:
    model = getattr(params_module, f"{name.title().replace('_', '')}Params")
    assert set(STAGES[name]["params"]) == set(model.model_fields)
    read = {
        node.attr
        for node in ast.walk(ast.parse((ROOT / f"stages/{name}.py").read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"
    }
    assert read - {"model_dump"} == set(model.model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_no_stage_imports_another(name: str) -> None:
    files = {str(file) for file in imported_files(Path(f"stages/{name}.py"))}
    assert {file for file in files if file.count("/") == 1} == {f"stages/{name}.py"}


def test_every_parameter_is_read_and_has_a_comment() -> None:
    lines = (ROOT / "params.yaml").read_text().splitlines()
    names = [line.split(":")[0] for line in lines if line and line[0] not in " #"]
    assert set(names) == {name for model in params_module.STAGES for name in model.model_fields}
    uncommented = [line for line in lines if line and line[0] not in " #" and " # " not in line]
    assert [line.split(":")[0] for line in uncommented] == ["model_name"]  # its comment is the line above


def test_the_tuned_model_is_an_artifact() -> None:
    artifacts = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["artifacts"]
    assert artifacts["tuned"]["path"] == "models/tuned"
    assert artifacts["tuned"]["type"] == "model"
