"""Write a Markdown file as our one comment on a pull request: a new one, or over that of an earlier run.

A job of GitHub Actions has GITHUB_API_URL, GITHUB_REPOSITORY and GITHUB_EVENT_PATH, and is handed GITHUB_TOKEN.
REVIEW_PAGE, the address of the review as a page, may be left out.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import requests

MARKER = "<!-- sft-pipeline review -->"  # the first line of our comment, which GitHub does not show
MAX_CHARACTERS = 65_536  # GitHub refuses a longer comment
LOGIN_OF_JOBS = "github-actions[bot]"
WHAT_TO_DO = {
    401: "GITHUB_TOKEN is not valid, or no longer; hand the step `github.token`",
    403: "the token may not write here; give the job `permissions: pull-requests: write`",
    404: "the repository or the pull request is not there, or the token may not see it",
}


class RefusedError(Exception):
    """GitHub did not do what it was asked."""

    def __init__(self, answer: requests.Response) -> None:
        self.answer = answer


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/comment.py review.md")
    review = Path(sys.argv[1])
    if not review.is_file():
        sys.exit(f"{review}: there is no such file; `make review` writes it")
    event = json.loads(Path(setting("GITHUB_EVENT_PATH")).read_text(encoding="utf-8"))
    if "pull_request" not in event:
        sys.exit("not commented: the event in GITHUB_EVENT_PATH is not that of a pull request")
    text = comment_text(review.read_text(encoding="utf-8"), os.environ.get("REVIEW_PAGE", ""))
    try:
        print(write_comment(f"/repos/{setting('GITHUB_REPOSITORY')}/issues", event["pull_request"]["number"], text))
    except RefusedError as error:
        if error.answer.status_code != 403 or not from_fork(event["pull_request"]):
            sys.exit(f"not commented: {explain(error.answer)}")
        print("not commented: for a pull request from a fork the token may only read; see the summary of the job")
    except requests.RequestException as error:
        where = setting("GITHUB_API_URL")
        sys.exit(f"not commented: no answer from {where} ({type(error).__name__}); run the job again")


def comment_text(review: str, page: str) -> str:
    """The review below the marker and a link to its page, cut at the end of a line where GitHub would refuse it."""
    head = f"{MARKER}\n" + (f"[The review as a page]({page})\n\n" if page else "")
    if len(head + review) <= MAX_CHARACTERS:
        return head + review
    # Not at the end: what is cut may end inside a block of code, which would swallow it.
    head += "> Only the beginning: GitHub takes no longer comment. All is in review.html, the artifact of this run.\n\n"
    beginning = review[: MAX_CHARACTERS - len(head)]
    return head + beginning[: beginning.rfind("\n") + 1]


def write_comment(issues: str, number: int, text: str) -> str:
    """Update our comment on a pull request, or create it; say which, and where it is."""
    identifier = find_comment(f"{issues}/{number}/comments")
    if identifier:
        return f"updated {call('PATCH', f'{issues}/comments/{identifier}', text).json()['html_url']}"
    return f"created {call('POST', f'{issues}/{number}/comments', text).json()['html_url']}"


def find_comment(comments: str) -> int | None:
    """The id of the comment that begins with the marker and is ours.

    Our token may write over the comments of others too. Whoever put the marker there first would get the review under
    their name, and could then edit it.
    """
    login = own_login()
    for page in itertools.count(1):
        answer = call("GET", f"{comments}?per_page=100&page={page}")
        for comment in answer.json():
            author = comment["user"] and comment["user"]["login"]  # a deleted account is null
            if author == login and comment["body"].splitlines()[:1] == [MARKER]:
                return int(comment["id"])
        if "next" not in answer.links:
            break
    return None


def own_login() -> str:
    """Whose token it is. That of a job may not ask: GitHub answers 403."""
    try:
        return str(call("GET", "/user").json()["login"])
    except RefusedError as error:
        if error.answer.status_code != 403:
            raise
        return LOGIN_OF_JOBS


def call(method: str, path: str, text: str | None = None) -> requests.Response:
    """GitHub's answer.

    Raises:
        RefusedError: if GitHub did not do it.
        requests.RequestException: if there was no answer.
    """
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {setting('GITHUB_TOKEN')}",
        "X-GitHub-Api-Version": "2022-11-28",
    }
    body = None if text is None else {"body": text}
    answer = requests.request(method, setting("GITHUB_API_URL") + path, headers=headers, json=body, timeout=30)
    if not answer.ok:
        raise RefusedError(answer)
    return answer


def from_fork(pull_request: dict[str, Any]) -> bool:
    head = pull_request["head"]["repo"] or {}  # a deleted fork is null
    return bool(head.get("full_name") != pull_request["base"]["repo"]["full_name"])


def explain(answer: requests.Response) -> str:
    """What was asked, what GitHub said and what to do, on one line."""
    try:
        said = answer.json()["message"]
    except (ValueError, KeyError, TypeError):  # a page of a server in between
        said = answer.reason
    what_to_do = WHAT_TO_DO.get(answer.status_code, "run the job again, GitHub may have had a fault")
    return f"{answer.request.method} {answer.url}: {answer.status_code} {said}; {what_to_do}"


def setting(name: str) -> str:
    """A variable of the environment that has to be there."""
    if not os.environ.get(name):
        sys.exit(f"not commented: {name} is not set; a job of GitHub Actions has it, or is handed it")
    return os.environ[name]


if __name__ == "__main__":
    main()
