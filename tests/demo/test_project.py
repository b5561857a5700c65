"""The demo uses the parameters, the template and the settings with which the tests run."""

import pytest

from tests.clone import DVC_CONFIG, ROOT, USER_FILES


@pytest.mark.parametrize("name", ["params.yaml", "gates.yaml", "scorers.py", "templates/plain.jinja"])
def test_file_is_that_of_tests_project(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == (USER_FILES / name).read_text(encoding="utf-8")


def test_settings_of_dvc_are_those_of_the_clones() -> None:
    assert (ROOT / ".dvc/config").read_text(encoding="utf-8") == DVC_CONFIG
