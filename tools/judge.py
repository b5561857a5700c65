"""Let a model vote: an OpenAI-compatible endpoint compares the answers of two revisions."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from review.votes import JUDGE, Choice, Pair, Vote, read_votes, update_votes
from stages.runtime.errors import UserError
from stages.runtime.terminal import progress

TIMEOUT = 60.0  # seconds for one comparison
TRY_AGAIN = "must be an OpenAI-compatible API, such as http://127.0.0.1:8080/v1; check it and run again: votes are kept"
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


class BadReplyError(Exception):
    """A reply that is not a choice."""

    def __init__(self, reply: str):
        super().__init__(reply)
        self.reply = reply


def ask_judge(pairs: Sequence[Pair], path: Path, url: str, model: str) -> None:
    """Add the judge's votes on the pairs that it has not voted on. Each one is saved before the next is asked.

    Models often prefer the answer that they read first or last. So both orders are asked, and a choice counts only if
    it is the same in both; otherwise the vote is equal.

    Raises:
        UserError: the endpoint can't be reached or takes too long; or, at the end, if replies were not choices.
    """
    from httpx2 import Client

    if not model:
        raise UserError("the model of the judge is not known; set it: make vote JUDGE=URL JUDGE_MODEL=NAME")
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    voter = f"{JUDGE} {model}"
    done = {vote.example_id for vote in read_votes(path, pairs) if vote.voter == voter}
    left = [pair for pair in pairs if pair.example_id not in done]
    problems = []
    for pair in progress(left, "judge", "prompt"):
        try:
            with judge_errors(url), Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=TIMEOUT) as client:
                first = ask(client, model, pair, pair.before, pair.after)
                second = ask(client, model, pair, pair.after, pair.before)
        except BadReplyError as error:
            problems.append(error)
            continue
        choice = CHOICES.get((first, second), "equal")
        vote = Vote(voter, JUDGE, pair.example_id, choice, *pair.hashes())
        update_votes(path, pairs, lambda votes, vote=vote: [*votes, vote])  # type: ignore[misc]
    if problems:
        raise UserError(
            f"JUDGE: {len(problems):,} of {len(left):,} prompts have no vote; the first: found the reply "
            f"{problems[0].reply!r:.100}; must be 1, 2 or 0; use a model that follows instructions"
        )


@contextmanager
def judge_errors(url: str) -> Iterator[None]:
    """Turn errors of the connection, or a reply of another kind, into a `UserError`."""
    from httpx2 import HTTPError, InvalidURL, TimeoutException

    try:
        yield
    except TimeoutException:
        raise UserError(f"JUDGE: {url}: no reply within {TIMEOUT:g} s; {TRY_AGAIN}") from None
    except (HTTPError, InvalidURL) as error:
        raise UserError(f"JUDGE: {url}: {error}; {TRY_AGAIN}") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"JUDGE: {url}: the reply is not a chat completion; {TRY_AGAIN}") from None


def ask(client: Any, model: str, pair: Pair, first: str, second: str) -> str:
    """The judge's choice: 1, 2 or 0.

    Raises:
        BadReplyError: the reply is something else.
    """
    question = QUESTION.format(prompt=pair.prompt, first=first, second=second)
    request = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    response = client.post("chat/completions", json=request).raise_for_status().json()
    reply = str(response["choices"][0]["message"]["content"])
    if not (choice := re.fullmatch(r"(?s:.*</think>)?[\W_]*([012])[\W_]*", reply)):
        raise BadReplyError(reply)
    return choice[1]
