"""`LICENSES.md` lists every direct dependency with the license in its own metadata."""

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
# Name and license of each row that ends with a home page.
ROWS = re.findall(r"^\| (\S+) \| (.+) \| https://\S+ \|$", (ROOT / "LICENSES.md").read_text(encoding="utf-8"), re.M)


def license_of(package: str) -> str:
    """The SPDX expression, else a short text (that of matplotlib has 64,000 characters), else the classifiers."""
    fields = metadata.metadata(package)
    text = fields.get("License-Expression") or fields.get("License", "")
    if 0 < len(text) <= 200:
        return text
    prefix = "License :: OSI Approved :: "
    return ", ".join(name.removeprefix(prefix) for name in fields.get_all("Classifier", []) if name.startswith(prefix))


def test_rows_are_exactly_the_direct_dependencies() -> None:
    assert [name for name, _ in ROWS] == sorted({*DIRECT})


@pytest.mark.parametrize("name", sorted({*DIRECT}))
def test_license_is_that_of_the_metadata(name: str) -> None:
    try:
        expected = license_of(name)
    except metadata.PackageNotFoundError:
        # `make test` does not install the packages of the benchmarks, so only their rows are checked.
        assert name in BENCH
        pytest.skip("not installed; only its row was checked")
    assert dict(ROWS)[name] == expected
