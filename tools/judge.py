"""Let a model vote: an OpenAI-compatible endpoint compares the answers of two revisions."""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from httpx2 import URL, Client, HTTPError, InvalidURL, Response, TimeoutException

from review.votes import JUDGE, Choice, Pair, Vote, read_votes, update_votes
from stages.runtime.errors import UserError
from stages.runtime.secrets import without_secrets
from stages.runtime.terminal import progress
from stages.text import printable

TIMEOUT = 60.0  # seconds for one comparison
BUSY, NUM_ATTEMPTS, MAX_WAIT = (429, 503), 4, 60.0  # statuses after which a request is sent again; seconds
UNUSABLE = (401, 402, 403, 404, 405, 407)  # statuses that concern all prompts
MAX_MESSAGE = 300  # characters of a server's message or a reply that are shown
TRY_AGAIN = (
    "must be an OpenAI-compatible API, such as http://127.0.0.1:8080/v1; check it, JUDGE_MODEL and OPENAI_API_KEY, and "
    "run again: votes are kept"
)
# By the number of the better answer in both orders.
CHOICES: dict[tuple[str, str], Choice] = {("1", "2"): "before", ("2", "1"): "after"}
QUESTION = """\
Compare two answers to a prompt. Which one is better: more correct, and more as the prompt asks? Reply with a single
digit and nothing else: 1 if the first answer is better, 2 if the second one is, 0 if they are equally good.

<prompt>
{prompt}
</prompt>
<answer number="1">
{first}
</answer>
<answer number="2">
{second}
</answer>
"""


class NoVoteError(Exception):
    """Why a prompt has no vote. Others may have one."""

    def __init__(self, reason: str, is_busy: bool = False):
        super().__init__(reason)
        self.is_busy = is_busy


class UnusableError(Exception):
    """Why the server can't be used for any prompt."""


def ask_judge(pairs: Sequence[Pair], path: Path, url: str, model: str) -> None:
    """Add the judge's votes on the pairs that it has not voted on. Each one is saved before the next is asked.

    Models often prefer the answer that they read first or last. So both orders are asked, and a choice counts only if
    it is the same in both; otherwise the vote is equal.

    Raises:
        UserError: the endpoint can't be used, or a vote can't be saved; or, at the end, if prompts have no vote.
    """
    if not model:
        raise UserError("the model of the judge is not known; set it: make vote JUDGE=URL JUDGE_MODEL=NAME")
    voter = f"{JUDGE} {model}"
    done = {vote.example_id for vote in read_votes(path, pairs) if vote.identity == (voter, JUDGE)}
    left = [pair for pair in pairs if pair.example_id not in done]
    problems: Counter[str] = Counter()
    is_busy = False  # whether it was too busy for the last prompt; then the next one does not wait again
    with connect(url) as client:
        for pair in progress(left, "judge", "prompt"):
            try:
                attempts = 1 if is_busy else NUM_ATTEMPTS
                first = ask(client, model, pair, pair.before, pair.after, attempts)
                second = ask(client, model, pair, pair.after, pair.before, attempts)
            except NoVoteError as error:
                problems[str(error)] += 1
                is_busy = error.is_busy
                continue
            is_busy = False
            choice = CHOICES.get((first, second), "equal")
            vote = Vote(voter, JUDGE, pair.example_id, choice, *pair.hashes())
            update_votes(path, lambda votes, vote=vote: [*votes, vote])  # type: ignore[misc]
    if problems:
        reasons = "; ".join(f"{reason} ({number:,})" for reason, number in problems.most_common(3))
        raise UserError(
            f"JUDGE: {problems.total():,} of {len(left):,} prompts have no vote. The most frequent reasons: {reasons}. "
            "Run again to retry them, or use another model"
        )


@contextmanager
def connect(url: str) -> Iterator[Client]:
    """A client of the judge's API. Errors of the connection become a `UserError` without passwords."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError("OPENAI_API_KEY: has other characters than printable ASCII; set it again")
    try:
        base = URL(url.rstrip("/") + "/")
    except InvalidURL:
        base = URL()
    if not base.host or ("@" in url and not base.userinfo):
        raise UserError(f"JUDGE: not a URL; {TRY_AGAIN}. In a password, write special characters like %2F for /")
    try:
        client = Client(base_url=base, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=TIMEOUT)
    except (InvalidURL, ValueError, ImportError):
        raise UserError("HTTP_PROXY, HTTPS_PROXY, ALL_PROXY: must be a URL like http://host:port, or not set") from None
    where = f"JUDGE: {base.copy_with(userinfo=b'', query=None, fragment=None)}".rstrip("/")
    try:
        with client:
            yield client
    except TimeoutException:
        raise UserError(f"{where}: no reply within {TIMEOUT:g} s; {TRY_AGAIN}") from None
    except HTTPError as error:
        raise UserError(f"{where}: {shown(str(error)) or type(error).__name__}; {TRY_AGAIN}") from None
    except UnusableError as error:
        raise UserError(f"{where}: {error}; {TRY_AGAIN}") from None


def ask(client: Client, model: str, pair: Pair, first: str, second: str, attempts: int) -> str:
    """The judge's choice: 1, 2 or 0.

    Raises:
        NoVoteError: the server refuses this prompt, or the reply is not a choice.
        UnusableError: the server would refuse all prompts, or is of another kind.
    """
    question = QUESTION.format(prompt=pair.prompt, first=first, second=second)
    request = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    response = client.post("chat/completions", json=request)
    for attempt in range(1, attempts):
        if response.status_code not in BUSY:
            break
        time.sleep(min(seconds_to_wait(response, 2**attempt), MAX_WAIT))
        response = client.post("chat/completions", json=request)
    status = response.status_code
    if status in UNUSABLE or response.is_redirect:
        raise UnusableError(server_message(response))
    if not response.is_success:
        raise NoVoteError(server_message(response), is_busy=status in BUSY)
    content = content_of(response)
    if not isinstance(content, dict):
        raise UnusableError("the reply is not a chat completion")
    try:
        reply = str(content["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise NoVoteError(server_message(response)) from None
    if not (choice := re.fullmatch(r"(?s:.*</think>)?[\W_]*([012])[\W_]*", reply)):
        raise NoVoteError(f"the reply {shown(reply, response)!r} is not 1, 2 or 0")
    return choice[1]


def seconds_to_wait(response: Response, default: float) -> float:
    """What the header Retry-After says, which is a number of seconds or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # another kind of text, or a date without time zone
        return default


def server_message(response: Response) -> str:
    """The status and the server's own message, which is in the field error, error.message, message or detail."""
    message = content_of(response)
    for name in ("error", "message", "detail"):
        if isinstance(message, dict) and message.get(name):
            message = message[name]
    return f"HTTP {response.status_code}: {shown(str(message), response) or response.reason_phrase}"


def content_of(response: Response) -> Any:
    """The JSON, or the text if it is something else than JSON or a web page."""
    try:
        return response.json()
    except ValueError:
        return "" if "html" in response.headers.get("Content-Type", "") else response.text


def shown(text: str, response: Response | None = None) -> str:
    """A server's text on one short line, without secrets, in particular without those that were sent to it."""
    if response is not None:
        login = response.request.headers.get("Authorization", "").rpartition(" ")[2]
        for secret in filter(None, (login, response.request.url.password)):
            text = text.replace(secret, "***")
    return " ".join(printable(without_secrets(text)).split())[:MAX_MESSAGE]
