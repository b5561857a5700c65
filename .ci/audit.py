"""Look for known vulnerabilities in the pins of constraints.txt and for secrets in the tracked files; fail on any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import requests  # what pip-audit asks with: both find the same proxies and certificates
from kingfisher_sdk import DetectionPolicy, Scanner

ADVISORY_SERVICE = "https://api.osv.dev/v1/query"


def main() -> None:
    found_nothing = [audit_dependencies(os.environ.get("ADVISORY_SERVICE", ADVISORY_SERVICE)), scan_for_secrets()]
    sys.exit(not all(found_nothing))


def audit_dependencies(service: str) -> bool:
    """False if a pin is known to be vulnerable, and if the audit broke off.

    pip-audit exits with 1 on a vulnerability and on a dead network alike. So the service is first asked for a release
    that has known vulnerabilities. Without an answer nothing is audited; after the answer whatever stops pip-audit is
    a failure. No finding can pass as a dead network, nor can a service that knows nothing pass as a clean audit.
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
        print(f"dependency audit: failed, {service} knows of nothing in jinja2 2.4.1, which is vulnerable")
        return False
    # The file rather than the environment: there torch may be 2.13.0+cpu, a version that no advisory names.
    # An advisory that does not concern us is passed over with --ignore-vuln, and its reason beside it.
    command = [sys.executable, "-m", "pip_audit", "--requirement", "constraints.txt", "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--osv-url", service, "--strict", "--progress-spinner", "off"]
    audit = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (a list of our own words)
    if audit.returncode == 0:
        print("dependency audit: nothing known against the pins of constraints.txt")
    elif audit.stdout:  # the table of vulnerabilities
        print(f"dependency audit: vulnerable\n{audit.stdout}", end="")
    else:
        print(f"dependency audit: failed, pip-audit broke off before it had asked for all\n{audit.stderr}", end="")
    return audit.returncode == 0


def scan_for_secrets() -> bool:
    """False if a tracked file has a secret. Kingfisher scans offline; what it finds is named but not printed.

    A false alarm is silenced by a comment `kingfisher:ignore` on its line.
    """
    git = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)  # noqa: S607 (as found)
    files = [name for name in git.stdout.split("\0") if Path(name).is_file()]  # without those that are deleted
    scanner = Scanner(policy=DetectionPolicy())
    secrets = [(name, finding) for name in files for finding in scanner.scan_file(name)]
    print(f"secret scan: {len(secrets)} found in {len(files)} tracked files")
    for name, finding in secrets:
        print(f"{name}:{finding.location['line']}: {finding.rule_name}")
    return not secrets


if __name__ == "__main__":
    main()
