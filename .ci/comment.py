"""Post a Markdown file as a comment on a pull request; a later run updates that comment.

GitHub Actions sets GITHUB_API_URL, GITHUB_REPOSITORY and GITHUB_EVENT_PATH; the step passes GITHUB_TOKEN. REVIEW_PAGE,
the URL of the review as a page, is optional.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import requests

MARKER = "<!-- sft-pipeline review -->"  # the first line of the comment, which GitHub does not display
MAX_CHARACTERS = 65_536  # GitHub rejects longer comments
ACTIONS_LOGIN = "github-actions[bot]"
ADVICE = {
    401: "GITHUB_TOKEN is invalid or expired; pass `github.token` to the step",
    403: "the token can't write comments; give the job `permissions: pull-requests: write`",
    404: "the repository or the pull request does not exist, or the token can't read it; check both",
}


class GitHubError(Exception):
    """GitHub rejected a request."""

    def __init__(self, response: requests.Response) -> None:
        self.response = response


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/comment.py review.md")
    review = Path(sys.argv[1])
    if not review.is_file():
        sys.exit(f"{review}: not found; `make review` writes it")
    event = json.loads(Path(require_env("GITHUB_EVENT_PATH")).read_text(encoding="utf-8"))
    if "pull_request" not in event:
        sys.exit("no comment written: GITHUB_EVENT_PATH is not the event of a pull request; run this only for those")
    text = comment_text(review.read_text(encoding="utf-8"), os.environ.get("REVIEW_PAGE", ""))
    try:
        print(write_comment(f"/repos/{require_env('GITHUB_REPOSITORY')}/issues", event["pull_request"]["number"], text))
    except GitHubError as error:
        if error.response.status_code != 403 or not is_from_fork(event["pull_request"]):
            sys.exit(f"no comment written: {describe_error(error.response)}")
        print("no comment written: the token of a pull request from a fork is read-only; see the job summary")
    except requests.RequestException as error:
        where = require_env("GITHUB_API_URL")
        sys.exit(f"no comment written: no response from {where} ({type(error).__name__}); run the job again")


def comment_text(review: str, page: str) -> str:
    """The marker, a link to the page and the review, truncated at the end of a line if it is too long for GitHub."""
    head = f"{MARKER}\n" + (f"[The review as a page]({page})\n\n" if page else "")
    if len(head + review) <= MAX_CHARACTERS:
        return head + review
    # This note is at the beginning, because the truncated text may end inside a code block.
    head += "> Truncated to GitHub's limit. The full review is review.html, the artifact of this run.\n\n"
    truncated = review[: MAX_CHARACTERS - len(head)]
    return head + truncated[: truncated.rfind("\n") + 1]


def write_comment(issues: str, number: int, text: str) -> str:
    """Update our comment on a pull request, or create it; returns "updated" or "created", and its URL."""
    identifier = find_comment(f"{issues}/{number}/comments")
    if identifier:
        return f"updated {call('PATCH', f'{issues}/comments/{identifier}', text).json()['html_url']}"
    return f"created {call('POST', f'{issues}/{number}/comments', text).json()['html_url']}"


def find_comment(comments: str) -> int | None:
    """The id of our comment that begins with the marker; None if there is none.

    Comments of other authors are ignored, although the token can edit them. Otherwise, someone who posts the marker
    first would be shown as the author of the review, and could edit it.
    """
    login = own_login()
    for page in itertools.count(1):
        response = call("GET", f"{comments}?per_page=100&page={page}")
        for comment in response.json():
            author = comment["user"] and comment["user"]["login"]  # a deleted account is null
            if author == login and comment["body"].splitlines()[:1] == [MARKER]:
                return int(comment["id"])
        if "next" not in response.links:
            break
    return None


def own_login() -> str:
    """The login of the token's owner. For the token of a job, GitHub answers this request with 403."""
    try:
        return str(call("GET", "/user").json()["login"])
    except GitHubError as error:
        if error.response.status_code != 403:
            raise
        return ACTIONS_LOGIN


def call(method: str, path: str, text: str | None = None) -> requests.Response:
    """Send a request to GitHub's API and return the response.

    Raises:
        GitHubError: GitHub rejected the request.
        requests.RequestException: there was no response.
    """
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {require_env('GITHUB_TOKEN')}",
        "X-GitHub-Api-Version": "2022-11-28",
    }
    body = None if text is None else {"body": text}
    response = requests.request(method, require_env("GITHUB_API_URL") + path, headers=headers, json=body, timeout=30)
    if not response.ok:
        raise GitHubError(response)
    return response


def is_from_fork(pull_request: dict[str, Any]) -> bool:
    head = pull_request["head"]["repo"] or {}  # a deleted fork is null
    return bool(head.get("full_name") != pull_request["base"]["repo"]["full_name"])


def describe_error(response: requests.Response) -> str:
    """One line with the request, GitHub's message and what to do."""
    try:
        message = response.json()["message"]
    except (ValueError, KeyError, TypeError):  # an HTML page, for example of a proxy
        message = response.reason
    advice = ADVICE.get(response.status_code, "run the job again; GitHub may have a temporary problem")
    return f"{response.request.method} {response.url}: {response.status_code} {message}; {advice}"


def require_env(name: str) -> str:
    """The value of an environment variable that must be set."""
    if not os.environ.get(name):
        sys.exit(f"no comment written: {name} is not set; run this in a job of GitHub Actions that passes GITHUB_TOKEN")
    return os.environ[name]


if __name__ == "__main__":
    main()
