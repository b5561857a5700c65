"""`dvc.yaml` declares what the code uses: the modules that each stage imports and the parameters that it reads."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest

from stages.runtime import params as params_module
from stages.runtime.param_types import StageParams
from stages.runtime.yaml12 import parse_yaml
from tests.clone import ROOT, USER_FILES

PIPELINE: dict[str, Any] = parse_yaml((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]
NAMES = list(STAGES)
ALL = {name for model in params_module.STAGES for name in model.model_fields}
# Everything that stages import from `stages/runtime`. No stage depends on it, so none of this may change an output:
# it reports, limits, checks or schedules, and hands on parameters as they are.
FROM_RUNTIME = {
    *("LESS_MEMORY", "UserError", "describe_reason", "is_out_of_memory", "user_errors"),
    *("console", "disk_usage", "format_bytes", "progress", "summary", "hub_errors", "run"),
    *("file_lock", "memory_limit", "map_processes", "prefetch_map"),
    *("load_params", "DatasetParams", "PYPI_MODEL", "parse_yaml"),
}


@cache
def import_graph() -> grimp.ImportGraph:
    """All imports between modules of `stages`, also those inside functions; without those of `runtime`."""
    graph = grimp.build_graph("stages", exclude_type_checking_imports=True, cache_dir=None)
    for name in graph.find_descendants("stages.runtime"):
        graph.remove_module(name)
    return graph


def file_of(name: str) -> str:
    return f"{name.replace('.', '/')}.py"


def imported(stage: str) -> set[str]:
    """The files in `stages` that a stage runs or imports, also through other modules."""
    script = f"stages.{module(stage)}"
    return {file_of(name) for name in (script, *import_graph().find_upstream_modules(script))}


def declared(stage: str) -> set[str]:
    return {dep for dep in STAGES[stage]["deps"] if dep.startswith("stages/")}


def rerun_by(file: str) -> set[str]:
    """The stages that DVC runs again if the hash of this file changes."""
    paths = {str(path) for path in (Path(file), *Path(file).parents)}
    return {stage for stage in NAMES if paths & declared(stage)}


def parameters(name: str) -> set[str]:
    """The parameters of a stage. Some are in a list with an anchor, so that another stage can use the same list."""
    entries = STAGES[name].get("params", [])
    lists = [entry["params.yaml"] or ALL if isinstance(entry, dict) else [entry] for entry in entries]
    return {parameter for names in lists for parameter in names}


def module(name: str) -> str:
    """The module that a stage runs."""
    return str(STAGES[name]["cmd"]).partition("-m stages.")[2].split()[0]


def test_a_changed_module_reruns_every_stage_that_imports_it() -> None:
    files = {file_of(name) for name in import_graph().modules if (ROOT / file_of(name)).is_file()}
    assert len(files) > 60
    for file in files:
        assert {stage for stage in NAMES if file in imported(stage)} <= rerun_by(file), file


@pytest.mark.parametrize("stage", NAMES)
def test_a_stage_depends_on_no_package_that_it_does_not_import(stage: str) -> None:
    assert {dep for dep in declared(stage) if not any(file.startswith(dep) for file in imported(stage))} == set()


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("stages/rows/csv_rows.py", "download_dataset format"),  # a new reader
        ("stages/checks/kinds.py", "download_dataset format split evaluate evaluate_replicate"),  # a new kind of check
        ("stages/scoring/metrics.py", "evaluate evaluate_replicate"),  # a new metric
        ("stages/templates/rendering.py", "format score_rows predict replicate generate"),
        ("stages/train.py", "train replicate"),
        ("stages/runtime/terminal.py", ""),
    ],
)
def test_a_new_reader_check_metric_or_template_does_not_train(file: str, stages: str) -> None:
    assert (ROOT / file).is_file()
    assert rerun_by(file) == set(stages.split())


def test_stages_import_nothing_from_runtime_that_changes_an_output() -> None:
    allowed = FROM_RUNTIME | {name for name in vars(params_module) if name.endswith(("Params", "SplitFractions"))}
    for path in (ROOT / "stages").rglob("*.py"):
        if path.parent.name != "runtime":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages.runtime"):
                    assert {alias.name for alias in node.names} <= allowed, path


@pytest.mark.parametrize("model", params_module.STAGES)
def test_parameters_reach_a_stage_as_they_are_in_the_file(model: type[StageParams]) -> None:
    values = parse_yaml((USER_FILES / "params.yaml").read_text())
    values["template_options"] = {}  # null
    params = params_module.load_params(model, USER_FILES / "params.yaml")
    assert params.model_dump() == {name: values[name] for name in model.model_fields}
    own_classes = [each for each in model.__mro__ if each.__module__.startswith("stages.")]
    assert [name for each in own_classes for name, value in vars(each).items() if isinstance(value, property)] == []


def parameters_of_model(name: str) -> set[str]:
    if module(name) == "evaluate":  # it has none
        return set()
    if name == "check_params":
        return ALL
    return set(getattr(params_module, f"{name.title().replace('_', '')}Params").model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_declares_the_parameters_that_its_model_has(name: str) -> None:
    assert parameters(name) == parameters_of_model(name)


# replicate passes its parameters to the functions of train and predict, and check_params only validates them.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("replicate", "check_params")])
def test_a_stage_reads_the_parameters_that_its_model_has(name: str) -> None:
    sources = [ROOT / f"stages/{module(name)}.py"]
    if name == "train":
        sources += (ROOT / "stages/engine").glob("*.py")
    if name == "download_dataset":
        sources.append(ROOT / "stages/rows/sources.py")
    if name in ("score_rows", "predict"):
        sources.append(ROOT / "stages/engine/probe.py")
    if name in ("score_rows", "split"):
        sources.append(ROOT / "stages/data/splits.py")
    read = {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("params", "self.params", "engine.params")
    }
    if name == "train":
        read |= {"template", "template_options"}  # by the model card alone, which lists all parameters
    assert read - {"model_dump"} == parameters_of_model(name)


def test_every_parameter_is_read_and_has_a_comment() -> None:
    lines = (USER_FILES / "params.yaml").read_text().splitlines()
    names = {line.split(":")[0]: " # " in line for line in lines if line and line[0] not in " #"}
    assert names.keys() == ALL
    assert [name for name, has_comment in names.items() if not has_comment] == ["model_name"]  # it is the line above


def test_modules_and_functions_are_short() -> None:
    for path in (path for folder in ("stages", "tools", "review") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
