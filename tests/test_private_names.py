"""Private names of other libraries: each is used in one place, and a test says what breaks if it goes."""

import ast
from importlib.util import find_spec

from huggingface_hub import HfApi

from stages.runtime import hub
from tests.clone import ROOT

PACKAGES = ("stages", "tools", "review", "benchmarks")
USED = {"stages/runtime/hub.py": ["huggingface_hub.utils._http.default_client_factory"]}


def private_imports(text: str) -> list[str]:
    """The names that a module imports from other libraries and that are private, or in a private module."""
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith((*PACKAGES, "__future__"))
        for alias in node.names
        if any(part.startswith("_") for part in (*node.module.split("."), alias.name))
    ]


def test_no_other_private_name_is_imported() -> None:
    found = {}
    for path in (ROOT / "stages").rglob("*.py"):
        if path.parent.name != "engine" and (names := private_imports(path.read_text(encoding="utf-8"))):
            found[str(path.relative_to(ROOT))] = names
    assert found == USED


def test_downloads_need_the_default_client_for_redirects_and_its_own_hooks() -> None:
    client = hub._client()
    assert client.follow_redirects
    assert [hook.__module__ for hook in client.event_hooks["request"]] == ["huggingface_hub.utils._http", hub.__name__]


def test_faults_of_the_hub_client_are_recognized_by_the_modules_that_send_requests() -> None:
    modules = ("file_download", "hf_api", "hf_file_system", "_snapshot_download", "utils._auth", "utils._http")
    for name in (*modules, "utils._headers"):
        assert find_spec(f"huggingface_hub.{name}"), name
        assert hub.CLIENT.fullmatch(f"huggingface_hub.{name}")
    assert hub.CLIENT.fullmatch(HfApi.__module__)
