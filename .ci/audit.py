"""Check the pins of constraints.txt for known vulnerabilities and the tracked files for secrets; fail on any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import requests  # as pip-audit does, so that both use the same proxies and certificates
from kingfisher_sdk import DetectionPolicy, Scanner

ADVISORY_SERVICE = "https://api.osv.dev/v1/query"


def main() -> None:
    passed = [audit_dependencies(os.environ.get("ADVISORY_SERVICE", ADVISORY_SERVICE)), scan_for_secrets()]
    sys.exit(not all(passed))


def audit_dependencies(service: str) -> bool:
    """Return False if a pin has a known vulnerability, or if pip-audit stopped early.

    pip-audit exits with 1 on a vulnerability and also on a network error. To distinguish them, this function first
    queries the service for a release with known vulnerabilities. If this request fails, the audit is skipped and
    passes; afterwards any error of pip-audit fails. So a finding never counts as a network error, and a service without
    advisories never counts as a clean audit.
    """
    try:
        vulnerable = {"package": {"ecosystem": "PyPI", "name": "jinja2"}, "version": "2.4.1"}
        answer = requests.post(service, data=json.dumps(vulnerable), timeout=10)
        answer.raise_for_status()
        known = answer.json().get("vulns")
    except requests.RequestException as error:
        print(f"dependency audit: not done, the advisory service can't be reached ({type(error).__name__})")
        return True
    if not known:
        print(f"dependency audit: failed, {service} has no advisory on jinja2 2.4.1, which is vulnerable")
        return False
    # The file, not the environment, where torch may be 2.13.0+cpu, a version that no advisory names.
    # To ignore an advisory that does not affect this project, add --ignore-vuln with a comment that gives the reason.
    command = [sys.executable, "-m", "pip_audit", "--requirement", "constraints.txt", "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--osv-url", service, "--strict", "--progress-spinner", "off"]
    audit = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")  # noqa: S603 (a list of constants and the service's URL)
    if audit.returncode == 0:
        print("dependency audit: no known vulnerabilities in the pins of constraints.txt")
    elif audit.stdout:  # the table of vulnerabilities
        print(f"dependency audit: vulnerable\n{audit.stdout}", end="")
    else:
        print(f"dependency audit: failed, pip-audit stopped before it had checked all pins\n{audit.stderr}", end="")
    return audit.returncode == 0


def scan_for_secrets() -> bool:
    """Return False if a tracked file has a secret. Kingfisher scans offline; secrets are located but not printed.

    A comment `kingfisher:ignore` on a line suppresses a false positive.
    """
    git = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True)  # noqa: S607 (git from the PATH)
    files = [name for name in os.fsdecode(git.stdout).split("\0") if Path(name).is_file()]  # without deleted files
    scanner = Scanner(policy=DetectionPolicy())
    secrets = [(name, finding) for name in files for finding in scanner.scan_file(name)]
    print(f"secret scan: {len(secrets)} found in {len(files)} tracked files")
    for name, finding in secrets:
        print(f"{name}:{finding.location['line']}: {finding.rule_name}")
    return not secrets


if __name__ == "__main__":
    main()
