"""The Makefile: what each target installs, and that its variables reach programs literally."""

import ast
import re
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tests.clone import ROOT, run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LITERAL = "a$(shell touch pwned)b $$x ${HOME} `touch pwned` 'q'"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("target", "extras"),
    [
        ("repro data review vote chat publish check-lock clean row-scores selection verdicts", []),
        ("export", ["export"]),
        ("lm-eval", ["lm-eval"]),
        ("bench", ["bench"]),
        ("scaling optimizers memory", ["bench"]),
        ("test", ["dev"]),
        ("test-fast lint audit chaos architectures templates", ["dev"]),
    ],
)
def test_a_target_installs_what_it_needs(folder: Path, target: str, extras: list[str]) -> None:
    commands = run(folder, "make", "--dry-run", *target.split()).stdout
    installed = re.findall(r"^pip install .* --editable (.*)$", commands, re.MULTILINE)
    assert installed == [".", *(f"'.[{extra}]'" for extra in extras)]


@pytest.mark.subprocess
@pytest.mark.parametrize("target", ["repro", "bench", "scaling", "optimizers", "verdicts"])
def test_parameters_are_checked_before_dvc_deletes_outputs(folder: Path, target: str) -> None:
    commands = run(folder, "make", "--dry-run", target).stdout
    assert re.findall(r"^(python -m stages.runtime.preflight|dvc repro)", commands, re.MULTILINE) == [
        "python -m stages.runtime.preflight",
        "dvc repro",
    ]


@pytest.mark.subprocess
@pytest.mark.parametrize("given", ["as arguments", "in the environment"])
def test_variables_are_never_expanded(folder: Path, given: str) -> None:
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("installed", "installed-export", "bin/llama-quantize"):
        (folder / ".venv" / name).touch()
    python = folder / ".venv/bin/python"
    python.write_text('#!/bin/sh\nprintf "<%s>\\n" "$@"\n')
    python.chmod(0o755)
    values = dict.fromkeys(("BASE", "REV", "VOTER", "QUANT"), LITERAL)
    arguments = [f"{name}={value}" for name, value in values.items()] if given == "as arguments" else []
    command = ["make", "--silent", *arguments, "review", "vote", "export"]
    printed = run(folder, *command, **({} if arguments else values)).stdout.splitlines()
    assert printed == [
        *("<-m>", "<review>", f"<{LITERAL}>", f"<{LITERAL}>"),
        *("<-m>", "<tools.vote>", f"<{LITERAL}>", f"<{LITERAL}>", "<--voter>", f"<{LITERAL}>"),
        *("<--port>", "<8765>", "<--judge>", "<>", "<--judge-model>", "<>"),
        *("<-m>", "<tools.export>", "<--quant>", f"<{LITERAL}>"),
    ]
    assert not (folder / "pwned").exists()


@pytest.mark.subprocess
def test_data_is_compared_only_if_base_is_given(folder: Path) -> None:
    def command(*arguments: str, **env: str) -> str:
        given = [f"{name}={value}" for name, value in env.items()]
        make = ["env", "--unset=BASE", *given, "make", "--dry-run", "--no-print-directory"]  # `make test` exports BASE
        output = run(folder, *make, *arguments, "data").stdout
        return output.splitlines()[-1].strip()

    assert command() == "python -m tools.data_page"
    assert command("BASE=main") == 'python -m tools.data_page --base "$BASE"'
    assert command(BASE="main") == 'python -m tools.data_page --base "$BASE"'


@pytest.mark.subprocess
def test_default_values_of_variables(folder: Path) -> None:
    assert run(folder, "make", "--silent", "--eval=print:;@echo $$BASE $$REV $$PORT", "print").stdout == (
        "main workspace 8765\n"
    )


@pytest.mark.subprocess
def test_characters_that_the_terminal_lacks_do_not_end_a_command(folder: Path) -> None:
    code = f"--eval=print:;@{sys.executable} -c 'print(chr(0x2192))'"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run(folder, "make", "--silent", code, "print", **locale).stdout == "\\u2192\n"


def imported(*paths: Path) -> set[str]:
    """The distributions that these modules import, at the top or inside functions."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    distributions = metadata.packages_distributions()
    own = {"stages", "review", "tools", *sys.stdlib_module_names}
    return {distributions[name][0].lower().replace("_", "-") for name in names - own}


def test_the_pipeline_has_the_packages_that_its_modules_import() -> None:
    for_extras = {ROOT / f"{name}.py" for name in ("tools/export", "tools/gguf", "tools/harness")}
    for_extras.add(ROOT / "stages/engine/adamw_8bit.py")
    modules = {path for name in ("stages", "review", "tools") for path in (ROOT / name).rglob("*.py")} - for_extras
    needed = imported(*modules, ROOT / ".ci/check_lock.py")
    assert needed <= {*PROJECT["dependencies"]}
    assert "torch" in needed
    assert imported(ROOT / "tools/gguf.py") <= {*PROJECT["dependencies"], *EXTRAS["export"]}
    assert imported(ROOT / "tools/harness.py") <= {*PROJECT["dependencies"], *EXTRAS["lm-eval"]}
