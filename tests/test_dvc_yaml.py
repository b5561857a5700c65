"""`dvc.yaml` declares what the code uses: the packages that each stage imports and the parameters that it reads."""

import ast
from typing import Any

import pytest

from stages.runtime import params as params_module
from stages.runtime.yaml12 import parse_yaml
from tests.clone import ROOT, USER_FILES

PIPELINE: dict[str, Any] = parse_yaml((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]
NAMES = list(STAGES)
ALL = {name for model in params_module.STAGES for name in model.model_fields}
PROPERTIES = {
    "effective_batch_size": {"batch_size", "gradient_accumulation_steps"},
    "tokens_per_batch": {"batch_size", "max_length"},
    "uses_lora": {"finetuning"},
}


def imports(script: str) -> set[str]:
    """The packages and stages from which a script, or a stage that it imports, imports at any place."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    names = {"/".join(module.split(".")[:2]) for module in modules if module.startswith("stages.")}
    found = {name if (ROOT / name).is_dir() else f"{name}.py" for name in names}
    return found.union(*(imports(name) for name in found if name.endswith(".py")))


def parameters(name: str) -> set[str]:
    """The parameters of a stage. Some are in a list with an anchor, so that another stage can use the same list."""
    entries = STAGES[name].get("params", [])
    lists = [entry["params.yaml"] or ALL if isinstance(entry, dict) else [entry] for entry in entries]
    return {parameter for names in lists for parameter in names}


def test_the_pipeline_has_these_stages() -> None:
    assert NAMES == [
        "check_params",
        "download_dataset",
        "download_model",
        "format",
        "score_rows",
        "split",
        "train",
        "predict",
        "evaluate",
        "replicate",
        "evaluate_replicate",
        "generate",
    ]
    assert all(STAGES[name]["matrix"] == {"model": ["base", "tuned"]} for name in ("predict", "evaluate", "generate"))
    assert all(STAGES[name]["matrix"] == {"seed": "${replicate_seeds}"} for name in ("replicate", "evaluate_replicate"))
    assert all(stage["desc"] for stage in STAGES.values())


def module(name: str) -> str:
    """The module that a stage runs."""
    return str(STAGES[name]["cmd"]).partition("-m stages.")[2].split()[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_depends_on_its_script_and_on_the_packages_and_stages_that_it_imports(name: str) -> None:
    script = f"stages/{module(name)}.py"
    declared = {dep for dep in STAGES[name]["deps"] if dep.startswith("stages/")}
    assert declared == {script} | (imports(script) - {"stages/runtime"})


def test_modules_of_packages_import_nothing_that_their_stages_do_not_depend_on() -> None:
    allowed_by_package = {
        "data": {"data", "runtime"},
        "engine": {"engine", "data", "runtime"},
        "scoring": {"scoring", "data", "runtime"},
    }
    for package, allowed in allowed_by_package.items():
        for path in (ROOT / "stages" / package).glob("*.py"):
            assert imports(str(path.relative_to(ROOT))) <= {f"stages/{name}" for name in allowed}, path


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
        sources.append(ROOT / "stages/data/sources.py")
    if name in ("score_rows", "split"):
        sources.append(ROOT / "stages/data/splits.py")
    read = {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("params", "self.params", "engine.params")
    }
    for computed in read & PROPERTIES.keys():
        read |= PROPERTIES[computed]
    # model_dump gives all of them.
    assert read - {"model_dump", *PROPERTIES} == parameters_of_model(name)


def test_every_parameter_is_read_and_has_a_comment() -> None:
    lines = (USER_FILES / "params.yaml").read_text().splitlines()
    names = [line.split(":")[0] for line in lines if line and line[0] not in " #"]
    assert set(names) == ALL
    uncommented = [line for line in lines if line and line[0] not in " #" and " # " not in line]
    assert [line.split(":")[0] for line in uncommented] == ["model_name"]  # its comment is the line above


def test_the_tuned_model_is_an_artifact() -> None:
    tuned = PIPELINE["artifacts"]["tuned"]
    assert (tuned["path"], tuned["type"]) == ("models/tuned", "model")


def test_modules_and_functions_are_short() -> None:
    for path in (path for folder in ("stages", "tools", "review") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
