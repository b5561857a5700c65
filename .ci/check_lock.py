"""Check that dvc.lock matches the code, the parameters, the data and the metrics; exit with code 1 if it does not.

`review/outdated.py` describes the check.
"""

import sys

from dvc.exceptions import DvcException
from dvc.repo import Repo

from review.outdated import changed_model, differences
from stages.runtime.preflight import check_project
from stages.runtime.run import run


def main() -> None:
    check_project()
    try:
        with Repo() as repo:
            num_stages = len(repo.index.stages)
            found = [*differences(repo), *changed_model()]
    except DvcException as error:
        sys.exit(f"dvc.lock: can't be checked: {error}; `dvc status` shows where")
    if not num_stages:
        sys.exit("dvc.lock: can't be checked: dvc.yaml is missing or has no stages; restore it with git")
    if found:
        advice = "dvc.lock is out of date: run `dvc repro`, then commit dvc.lock and metrics/ with your changes"
        sys.exit("\n".join([*found, advice]))
    print("dvc.lock matches the code, the parameters, the data and the metrics")


if __name__ == "__main__":
    run(main, exclusive=False)
