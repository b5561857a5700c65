"""Download what a review compares to DVC's cache: splits, answers and predictions of the workspace and of a revision.

What can't be downloaded is missing in the review, which says so; DVC prints the reason.
"""

import re
import sys

from dvc.repo import Repo

from review.outdated import name_of
from stages.runtime.secrets import without_secrets
from stages.text import printable

STAGES = re.compile(r"split|(predict|evaluate)@tuned|(evaluate_)?replicate@.*")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/fetch.py BASE")
    with Repo() as repo:
        if not repo.config["remote"]:
            print("No DVC remote is configured.")
            return
        fetched = [fetch(repo, revision) for revision in ("workspace", sys.argv[1])]
    sys.exit(not all(fetched))


def fetch(repo: Repo, revision: str) -> bool:
    """Download the outputs of a revision; False if that failed, not if only the remote lacks a file."""
    try:
        with repo.switch(revision):
            names = [name for name in map(name_of, repo.index.stages) if STAGES.fullmatch(name)]
            number = repo.fetch(targets=names) if names else 0
    except Exception as error:  # each kind of remote has errors of its own
        print(printable(without_secrets(f"{revision}: {error or type(error).__name__}")))
        return False
    print(f"{revision}: {number} files downloaded")
    return True


if __name__ == "__main__":
    main()
