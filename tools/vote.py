"""Vote on the answers of two revisions without knowing which is which. `make vote BASE=main` serves the page.

`make vote BASE=main JUDGE=URL JUDGE_MODEL=NAME` asks a model instead: an OpenAI-compatible endpoint, in both orders.
"""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from review.revisions import WORKSPACE, Revision
from review.votes import Choice, Pair, Tally, Vote, find_notes, find_pairs, overall, read_votes, update_votes
from stages.data.splits import content_hash
from stages.runtime.errors import UserError
from stages.runtime.locks import file_lock
from stages.runtime.run import run
from stages.runtime.terminal import summary
from tools.vote_server import serve


class Ballot:
    """The prompts and votes of one voter. Every change is saved at once.

    Prompts are in a random order, and so are the two answers; both depend on the voter alone, so that a voter who comes
    back goes on with the same page.
    """

    def __init__(self, pairs: Sequence[Pair], path: Path, voter: str, voter_id: str, names: tuple[str, str]):
        self.pairs = {pair.example_id: pair for pair in pairs}
        self.path, self.identity, self.names = path, (voter, voter_id), names
        self.is_revealed = False
        # Prompts that were voted on or skipped, the last one at the end; and those that are left, the next one first.
        self.done = [vote.example_id for vote in self.of_voter(self.votes())]
        left = self.pairs.keys() - {*self.done}
        self.left = sorted(left, key=lambda example_id: content_hash(voter, voter_id, example_id))

    def votes(self) -> list[Vote]:
        return read_votes(self.path, [*self.pairs.values()])

    def of_voter(self, votes: list[Vote]) -> list[Vote]:
        return [vote for vote in votes if vote.identity == self.identity]

    def in_order(self, pair: Pair) -> tuple[Choice, Choice]:
        """The sides in the order in which their answers are shown."""
        return (
            ("before", "after") if int(content_hash(pair.example_id, *self.identity), 16) % 2 else ("after", "before")
        )

    def vote(self, example_id: str, answer: str) -> None:
        """Record the answer to the prompt that is shown; one to another prompt, such as a second click, is ignored."""
        if self.is_revealed or not self.left or self.left[0] != example_id:
            return
        if answer == "skip":
            self.left.append(example_id)
        else:
            pair = self.pairs[example_id]
            choice: Choice = "equal" if answer == "0" else self.in_order(pair)[int(answer) - 1]
            vote = Vote(*self.identity, example_id, choice, *pair.hashes())
            update_votes(self.path, lambda votes: [*votes, vote])
        self.left.pop(0)
        self.done.append(example_id)

    def undo(self) -> None:
        """Go back to the last prompt, and delete the vote on it."""
        if self.is_revealed or not self.done:
            return
        example_id = self.done[-1]
        key = (*self.identity, example_id, *self.pairs[example_id].hashes())

        def without_it(votes: list[Vote]) -> list[Vote]:
            return [vote for vote in votes if (*vote.identity, vote.example_id, vote.before, vote.after) != key]

        update_votes(self.path, without_it)
        self.done.pop()
        self.left = [example_id, *(other for other in self.left if other != example_id)]

    def reveal(self) -> None:
        self.is_revealed = True

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        votes = self.votes()
        votes_of_voter = self.of_voter(votes)
        state: dict[str, Any] = {
            "voted": len(votes_of_voter),
            "total": len(self.pairs),
            "canUndo": bool(self.done) and not self.is_revealed,
            "isEnough": overall(votes).verdict != "undecided",
            "pair": None,
            "result": None,
        }
        if self.is_revealed:
            state["result"] = result_in_words(overall(votes_of_voter), self.names)
        elif self.left:
            pair = self.pairs[self.left[0]]
            answers = [getattr(pair, side) for side in self.in_order(pair)]
            state["pair"] = {"id": pair.example_id, "prompt": pair.prompt, "answers": answers}
        return state


def result_in_words(tally: Tally, names: tuple[str, str]) -> str:
    before, after = names
    low, high = tally.interval
    return (
        f"Your votes: {after} {tally.wins:,}, {before} {tally.losses:,}, equal {tally.ties:,}. Share of {after} among "
        f"the decided: {low:.0%} to {high:.0%} (95% confidence sequence)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.vote", description=__doc__)
    parser.add_argument("base", help="branch, tag, commit or experiment to compare with")
    parser.add_argument("revision", nargs="?", default=WORKSPACE, help="the other revision; the workspace by default")
    parser.add_argument("--voter", default="", help="your name; by default user.name of git")
    parser.add_argument("--port", default="8765", help="port of the page on loopback")
    parser.add_argument("--judge", default="", metavar="URL", help="an OpenAI-compatible endpoint that votes instead")
    parser.add_argument("--judge-model", default="", metavar="NAME", help="the name of its model")
    options = parser.parse_args()
    for name, value in (("VOTER", options.voter), ("JUDGE_MODEL", options.judge_model)):
        if not value.isprintable():
            raise UserError(f"{name}: found {value!r}; must have printable characters only")

    before, after = Revision(options.base), Revision(options.revision)
    pairs_and_path = find_pairs(before, after)
    if pairs_and_path is None:
        missing = [
            f"{path} of {side.name} ({reason})" for side in (before, after) for path, reason in side.missing.items()
        ]
        reasons = ", ".join(missing) or "no predictions"
        raise UserError(f"no answers to vote on: {reasons}; `dvc repro` in a checkout of the revision writes them")
    pairs, path = pairs_and_path
    if not pairs:
        raise UserError(f"no answers to vote on: {before.name} and {after.name} answer every test prompt equally")
    for note in find_notes(path, pairs):
        print(note)
    if options.judge:
        from tools.judge import ask_judge

        ask_judge(pairs, path, options.judge, options.judge_model)
    else:
        voter = options.voter or git_config("user.name")
        if not voter:
            raise UserError("your name is not known; set it: make vote VOTER=..., or git config user.name")
        identity = voter, content_hash(git_config("user.email"))[:8]
        ballot = Ballot(pairs, path, *identity, (before.name, after.name))
        lock = Path(f".scratch/vote-{content_hash(str(path), *identity)[:12]}.lock")
        with file_lock(lock, f"serves the page of the voter {voter!r}"):
            serve(ballot, parse_port(options.port))
    tally = overall(read_votes(path, pairs))
    summary(
        {"votes": f"{tally.wins + tally.losses + tally.ties:,} of {len(pairs):,} prompts: {result(tally)}"},
        wrote=[path] if path.exists() else [],
        then=f"git add votes; make review BASE={options.base} REV={options.revision}",
    )


def parse_port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 2**16:
        raise UserError(f"PORT: found {text!r}; must be a number from 1 to 65535")
    return int(text)


def result(tally: Tally) -> str:
    """Whether there are enough votes for a verdict."""
    return "more votes are needed" if tally.verdict == "undecided" else f"enough; the change is {tally.verdict}"


def git_config(name: str) -> str:
    result = subprocess.run(["git", "config", name], capture_output=True, encoding="utf-8", errors="replace")  # noqa: S603, S607 (a list; git is on the path)
    return result.stdout.strip()


if __name__ == "__main__":
    run(main, exclusive=False)
