"""`LICENCES.md` names every direct dependency and the licence that its own metadata names."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BENCH: list[str] = PROJECT["optional-dependencies"]["bench"]
NAMED: list[str] = PROJECT["dependencies"] + BENCH + PROJECT["optional-dependencies"]["dev"]
DIRECT = [re.sub(r"\[.*", "", name) for name in NAMED]  # without extras, as in moto[server]
# Name and licence of each row that ends with a home page.
ROWS = re.findall(r"^\| (\S+) \| (.+) \| https://\S+ \|$", (ROOT / "LICENCES.md").read_text(encoding="utf-8"), re.M)


def licence(package: str) -> str:
    """The SPDX expression, else the short text, else the classifiers; matplotlib has a text of 64,000 characters."""
    fields = metadata.metadata(package)
    text = fields.get("License-Expression") or fields.get("License", "")
    if 0 < len(text) <= 200:
        return text
    prefix = "License :: OSI Approved :: "
    return ", ".join(name.removeprefix(prefix) for name in fields.get_all("Classifier", []) if name.startswith(prefix))


def test_every_direct_dependency_has_a_row_and_nothing_else_has() -> None:
    assert [name for name, _ in ROWS] == sorted(DIRECT)


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_the_licence_is_the_one_in_the_metadata(name: str) -> None:
    try:
        expected = licence(name)
    except metadata.PackageNotFoundError:
        # `make test` installs no benchmarks: of these only the row is checked, unless `make bench` ran before.
        assert name in BENCH
        pytest.skip("not installed, only its row was checked")
    assert dict(ROWS)[name] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hypothesis", "MPL-2.0"),  # an expression
        ("ruamel.yaml", "MIT"),  # a short text, beside a classifier
        ("safetensors", "Apache Software License"),  # a classifier alone
    ],
)
def test_an_expression_goes_before_a_text_and_a_text_before_a_classifier(name: str, expected: str) -> None:
    assert licence(name) == expected
