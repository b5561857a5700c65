"""`make audit` fails on vulnerable pins and on secrets, and reports if the advisory service can't be reached."""

import json
import random
import string
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.clone import ROOT, run
from tests.hub_server import running

pytestmark = [pytest.mark.subprocess, pytest.mark.usefixtures("fast_stages")]
UNREACHABLE = "http://127.0.0.1:0"  # no service can listen on port 0
NOT_DONE = "dependency audit: not done, the advisory service can't be reached"


def advisory(name: str, identifier: str) -> dict[str, Any]:
    return {"vulns": [{"id": identifier, "affected": [{"package": {"name": name, "ecosystem": "PyPI"}}]}]}


def vulnerable_numpy(name: str, version: str) -> dict[str, Any]:
    """The answer of a service with advisories on numpy 2.4.6 and on jinja2 2.4.1, which the audit asks for first."""
    known = {("jinja2", "2.4.1"): "PYSEC-1", ("numpy", "2.4.6"): "PYSEC-2"}
    return advisory(name, known[name, version]) if (name, version) in known else {}


@contextmanager
def advisory_service(answer: Callable[[str, str], dict[str, Any] | int]) -> Iterator[str]:
    """A local advisory service. `answer` maps a name and a version to the response body or to an HTTP status."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = answer(query["package"]["name"], query["version"])
            self.send_response(body if isinstance(body, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def audit(folder: Path, service: str = UNREACHABLE) -> tuple[int, str]:
    """Exit code and output of the audit of a folder."""
    script = str(ROOT / ".ci/audit.py")
    result = run(folder, "python", script, check=False, ADVISORY_SERVICE=service, NO_PROXY="127.0.0.1")
    return result.returncode, result.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two pins and no tracked files."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n\ntorch==2.13.0\n")
    return tmp_path


def track(repository: Path, name: str, text: str) -> None:
    (repository / name).write_text(text)
    subprocess.run(["git", "add", name], cwd=repository, check=True)


def test_a_service_that_can_not_be_reached_passes_with_a_message(repository: Path) -> None:
    scan = "secret scan: 0 found in 0 tracked files\n"
    assert audit(repository) == (0, f"{NOT_DONE} (ConnectionError)\n{scan}")
    with advisory_service(lambda name, version: 403) as refusing_proxy:
        assert audit(repository, refusing_proxy) == (0, f"{NOT_DONE} (HTTPError)\n{scan}")


def test_pins_without_a_known_vulnerability_pass(repository: Path) -> None:
    (repository / "constraints.txt").write_text("numpy==2.4.7\ntorch==2.13.0\n")
    with advisory_service(vulnerable_numpy) as service:
        code, output = audit(repository, service)
    assert code == 0
    assert output.splitlines()[0] == "dependency audit: no known vulnerabilities in the pins of constraints.txt"


def test_vulnerable_pin_fails_and_is_named(repository: Path) -> None:
    with advisory_service(vulnerable_numpy) as service:
        code, output = audit(repository, service)
    assert code == 1
    assert output.startswith("dependency audit: vulnerable\n")
    assert [line.split() for line in output.splitlines() if "PYSEC" in line] == [["numpy", "2.4.6", "PYSEC-2"]]


def test_audit_fails_if_the_service_stops_responding_after_a_finding(repository: Path) -> None:
    with advisory_service(lambda name, version: 503 if name == "torch" else vulnerable_numpy(name, version)) as service:
        code, output = audit(repository, service)
    assert code == 1
    assert output.startswith("dependency audit: failed, pip-audit stopped before it had checked all pins\n")


def test_service_without_advisories_fails_the_audit(repository: Path) -> None:
    with advisory_service(lambda name, version: {}) as service:
        code, output = audit(repository, service)
    assert code == 1
    assert output.startswith(
        f"dependency audit: failed, {service} has no advisory on jinja2 2.4.1, which is vulnerable"
    )


# Generated here, so that the scan of this file does not find them.
RANDOM = random.Random(0)
AWS_ID = "AKIA" + "".join(RANDOM.choices(string.ascii_uppercase + "234567", k=16))
AWS_SECRET = "".join(RANDOM.choices(string.ascii_letters + string.digits, k=40))
HF_TOKEN = "hf_" + "".join(RANDOM.choices(string.ascii_letters, k=34))
KEY_LINES = ["".join(RANDOM.choices(string.ascii_letters + string.digits, k=64)) for _ in range(8)]
PRIVATE_KEY = "\n".join(["-----BEGIN RSA PRIVATE " + "KEY-----", *KEY_LINES, "-----END RSA PRIVATE " + "KEY-----"])


@pytest.mark.parametrize(
    ("text", "secret", "found"),
    [
        (f"aws_access_key_id = {AWS_ID}\naws_secret_access_key = {AWS_SECRET}", AWS_SECRET, "AWS secret access key"),
        (f"dataset_name: a/b\nHere: {HF_TOKEN}", HF_TOKEN, "Hugging Face Access token"),
        (f"dataset_name: a/b\n{PRIVATE_KEY}", KEY_LINES[0], "Private Key"),
    ],
    ids=["AWS", "Hugging Face", "private key"],
)
def test_secret_in_any_tracked_file_fails_and_is_not_printed(
    repository: Path, text: str, secret: str, found: str
) -> None:
    names = ["README.md", "config", "dvc.lock", "params.yaml", "test.py"]
    for name in names:
        track(repository, name, f"{text}\n")
    code, output = audit(repository)
    assert code == 1
    assert [line.split(":2: ")[0] for line in output.splitlines() if found in line] == names
    assert secret not in output


def test_secret_in_json_is_found(repository: Path) -> None:
    track(repository, "rows.jsonl", json.dumps({"output": PRIVATE_KEY}) + "\n")
    code, output = audit(repository)
    assert code == 1
    assert "rows.jsonl:1: " in output


def test_untracked_and_deleted_files_are_not_scanned(repository: Path) -> None:
    (repository / ".env").write_text(f"{HF_TOKEN}\n")
    track(repository, "gone.txt", f"{HF_TOKEN}\n")
    (repository / "gone.txt").unlink()
    assert audit(repository)[0] == 0


def test_comment_suppresses_a_false_positive(repository: Path) -> None:
    track(repository, "a.py", f"token = '{HF_TOKEN}'  # kingfisher:ignore\n")
    assert audit(repository)[0] == 0
