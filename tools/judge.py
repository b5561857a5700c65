"""Let a model vote: an OpenAI-compatible endpoint compares the answers of two revisions."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from review.votes import JUDGE, Choice, Pair, Vote, read_votes, write_votes
from stages.runtime.errors import UserError
from stages.runtime.terminal import progress

TIMEOUT = 60.0  # seconds for one comparison
TRY_AGAIN = (
    "JUDGE must be an OpenAI-compatible API, such as http://127.0.0.1:8080/v1; check it and run again: votes are kept"
)
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


def ask_judge(pairs: Sequence[Pair], path: Path, url: str, model: str) -> None:
    """Add the judge's votes on the pairs that it has not voted on. Each one is saved before the next is asked.

    Models often prefer the answer that they read first or last. So both orders are asked, and a choice counts only if
    it is the same in both; otherwise the vote is equal.

    Raises:
        UserError: the endpoint can't be reached, takes too long, or replies with something else than a choice.
    """
    from httpx2 import Client

    if not model:
        raise UserError("the model of the judge is not known; set it: make vote JUDGE=URL JUDGE_MODEL=NAME")
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    voter, votes = f"{JUDGE} {model}", read_votes(path, pairs)
    done = {vote.example_id for vote in votes if vote.voter == voter}
    with Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=TIMEOUT) as client:
        for pair in progress([pair for pair in pairs if pair.example_id not in done], "judge", "prompt"):
            first = ask(client, model, pair, pair.before, pair.after)
            second = ask(client, model, pair, pair.after, pair.before)
            choice: Choice = {("1", "2"): "before", ("2", "1"): "after"}.get((first, second), "equal")  # type: ignore[assignment]
            votes.append(Vote(voter, JUDGE, pair.example_id, choice, *pair.hashes()))
            write_votes(path, votes)


def ask(client: Any, model: str, pair: Pair, first: str, second: str) -> str:
    """The judge's choice: 1, 2 or 0."""
    from httpx2 import HTTPError, InvalidURL, TimeoutException

    question = QUESTION.format(prompt=pair.prompt, first=first, second=second)
    request = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    where = f"the judge {client.base_url}"
    try:
        response = client.post("chat/completions", json=request).raise_for_status().json()
        reply = str(response["choices"][0]["message"]["content"])
    except TimeoutException:
        raise UserError(f"{where}: no reply within {TIMEOUT:g} s; {TRY_AGAIN}") from None
    except (HTTPError, InvalidURL) as error:
        raise UserError(f"{where}: {error}; {TRY_AGAIN}") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{where}: the reply is not a chat completion; {TRY_AGAIN}") from None
    if not (choice := re.match(r"(?s:.*</think>)?\W*([012])\b", reply)):
        raise UserError(
            f"{where}: found the reply {reply!r:.100}; must be 1, 2 or 0; use a model that follows instructions"
        )
    return choice[1]
