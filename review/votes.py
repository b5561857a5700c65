"""Blind votes on the answers of two revisions, in `votes/`: read and write them, count them, and test the result.

Each prompt counts once, by its first vote, because votes of several voters on one prompt are not independent. The
interval is a confidence sequence: it is valid however often it is computed, and whenever voting ends (Robbins 1970,
Statistical Methods Related to the Law of the Iterated Logarithm; Howard et al. 2021, Time-Uniform, Nonparametric,
Nonasymptotic Confidence Sequences, https://arxiv.org/abs/1810.08240).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError
from scipy.optimize import brentq
from scipy.special import betaln, xlogy

from review.data_changes import TEST, without_template
from review.rescoring import Rescoring
from review.revisions import Revision
from review.runs import read_answers
from stages.data.files import write_text
from stages.data.splits import content_hash
from stages.runtime.errors import UserError

VOTES, VOTES_LOCK = Path("votes"), Path(".scratch/votes.lock")
LOCK_TIMEOUT = 10.0  # seconds
ALPHA = 0.05  # the probability that the interval ever excludes the true share
PRIOR = 0.5  # both parameters of the Beta distribution that the martingale is mixed over
JUDGE = "judge"  # the id of voters that are models
Choice = Literal["before", "after", "equal"]


@dataclass(frozen=True)
class Pair:
    """A test prompt with two different answers."""

    example_id: str
    prompt: str
    before: str
    after: str

    def hashes(self) -> tuple[str, str]:
        return content_hash(self.before), content_hash(self.after)


@dataclass(frozen=True)
class Vote:
    """One vote.

    voter_id: tells voters of the same name apart.
    before, after: hashes of the answers.
    """

    voter: str
    voter_id: str
    example_id: str
    choice: Choice
    before: str
    after: str

    @property
    def identity(self) -> tuple[str, str]:
        return self.voter, self.voter_id


VOTE = TypeAdapter(Vote)


@dataclass(frozen=True)
class Tally:
    """The number of prompts on which `after` won, lost, and was equal."""

    wins: int
    losses: int
    ties: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence sequence of the share of wins among wins and losses."""
        if not self.wins + self.losses:
            return 0.0, 1.0

        def excess(share: float) -> float:
            return self.log_martingale(share) - math.log(1 / ALPHA)

        observed = self.wins / (self.wins + self.losses)
        low = brentq(excess, 1e-12, observed) if self.wins else 0.0
        high = brentq(excess, observed, 1 - 1e-12) if self.losses else 1.0
        return float(low), float(high)

    def log_martingale(self, share: float) -> float:
        """The log likelihood of the votes under a mixture of all shares, relative to that under a single one.

        If that share is the true one, this ever exceeds log(1 / ALPHA) with a probability of ALPHA (Ville).
        """
        mixture = betaln(self.wins + PRIOR, self.losses + PRIOR) - betaln(PRIOR, PRIOR)
        return float(mixture - xlogy(self.wins, share) - xlogy(self.losses, 1 - share))

    @property
    def verdict(self) -> str:
        low, high = self.interval
        if low > 0.5:
            return "better"
        return "worse" if high < 0.5 else "undecided"


@dataclass(frozen=True)
class VoteResults:
    """The votes on the answers of two revisions.

    num_pairs: prompts with different answers.
    overall: by people, the first vote on each prompt; by judges if no person has voted.
    by_voter: the votes of each voter, by name and id.
    agreement: for each two voters, the number of prompts that both voted on, and of those with the same choice.
    notes: votes that do not count, and why.
    """

    num_pairs: int
    overall: Tally
    by_voter: dict[tuple[str, str], Tally]
    agreement: dict[tuple[tuple[str, str], tuple[str, str]], tuple[int, int]]
    notes: list[str]


def find_pairs(before: Revision, after: Revision) -> tuple[list[Pair], Path] | None:
    """The test prompts with different answers, and the file of the votes on them; None if answers are not available."""
    test = after.read_table(TEST, ["example_id", "prompt"])
    old, new = read_answers(before, Rescoring()), read_answers(after, Rescoring())
    if test is None or not old or not new:
        return None
    pairs = []
    for example_id, prompt in zip(test["example_id"], test["prompt"], strict=True):
        if example_id in old and example_id in new:
            answers = str(old[example_id]["answer"]), str(new[example_id]["answer"])
            if answers[0] != answers[1]:
                pairs.append(Pair(example_id, without_template(prompt) or prompt, *answers))
    return pairs, VOTES / f"{hash_answers(old)}..{hash_answers(new)}.jsonl"


def hash_answers(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A hash of the answers by example id, for the name of a file."""
    parts: list[str] = []
    for example_id in sorted(rows):
        parts += [example_id, str(rows[example_id]["answer"])]
    return content_hash(*parts)[:12]


def read_votes(path: Path, pairs: Sequence[Pair]) -> list[Vote]:
    """The votes in a file on these pairs of answers, in the order in which they were cast.

    A voter's first vote on a prompt counts. There may be a second one after a merge of two clones.
    """
    hashes = {pair.example_id: pair.hashes() for pair in pairs}
    votes: dict[tuple[str, str, str], Vote] = {}
    for vote in read_file(path):
        if hashes.get(vote.example_id) == (vote.before, vote.after):
            votes.setdefault((*vote.identity, vote.example_id), vote)
    return [*votes.values()]


def read_file(path: Path) -> list[Vote]:
    """All votes in a file; none if there is no file.

    Raises:
        UserError: a line is not a vote.
    """
    votes = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            if line.strip():
                votes.append(VOTE.validate_json(line))
        except ValidationError as errors:
            problem = errors.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"{path}:{number}: not a vote: {name}: {problem['msg']}; correct or delete this line"
            ) from None
    return votes


def find_notes(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """The numbers of votes that do not count; of those in other files only if no vote counts."""
    hashes = {(pair.example_id, *pair.hashes()) for pair in pairs}
    votes = read_file(path)
    num_valid = sum((vote.example_id, vote.before, vote.after) in hashes for vote in votes)
    num_other = len(votes) - num_valid
    if not num_valid:
        others = {*VOTES.glob("*.jsonl")} - {path}
        num_other += sum(bool(line.strip()) for other in others for line in other.read_bytes().splitlines())
    notes = []
    if num_other:
        notes.append(
            f"Votes in {VOTES}/ on other answers than those of these revisions, which do not count: {num_other:,}."
        )
    if num_repeated := num_valid - len(read_votes(path, pairs)):
        notes.append(f"Second votes of a voter on a prompt in {path}, which do not count: {num_repeated:,}.")
    return notes


def update_votes(path: Path, change: Callable[[list[Vote]], list[Vote]]) -> None:
    """Read all votes of a file, change them and write them, while no other process does so.

    Raises:
        UserError: the change can't be saved. The file is as it was.
    """
    try:
        VOTES_LOCK.parent.mkdir(exist_ok=True)
        with FileLock(VOTES_LOCK, timeout=LOCK_TIMEOUT):
            votes = change(read_file(path))
            write_text(path, "".join(json.dumps(asdict(vote), ensure_ascii=False) + "\n" for vote in votes))
    except UserError as error:
        raise UserError(f"not saved: {error}, then try again") from None
    except OSError as error:
        raise UserError(
            f"not saved: {error.filename or path}: {error.strerror or error}; free some space or make {VOTES}/ and "
            f"{VOTES_LOCK.parent}/ writable, then try again"
        ) from None


def overall(votes: Sequence[Vote]) -> Tally:
    """The tally of the first vote on each prompt, by people if there are any."""
    people = [vote for vote in votes if vote.voter_id != JUDGE] or votes
    choices = [*{vote.example_id: vote.choice for vote in reversed(people)}.values()]
    return Tally(choices.count("after"), choices.count("before"), choices.count("equal"))


def count_votes(before: Revision, after: Revision) -> VoteResults | None:
    """The results of all votes on the answers of two revisions; None if there are none to count or to note."""
    pairs_and_path = find_pairs(before, after) if VOTES.exists() else None
    if pairs_and_path is None:
        return None
    pairs, path = pairs_and_path
    try:
        votes, notes = read_votes(path, pairs), find_notes(path, pairs)
    except (UserError, OSError) as error:
        votes, notes = [], [f"No vote counts, because the votes can't be read: {error}."]
    if not votes and not notes:
        return None
    by_voter: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        by_voter.setdefault(vote.identity, []).append(vote)
    choices = {voter: {vote.example_id: vote.choice for vote in of_voter} for voter, of_voter in by_voter.items()}
    agreement = {}
    for first, second in combinations(choices, 2):
        if common := choices[first].keys() & choices[second].keys():
            agreement[first, second] = len(common), len(choices[first].items() & choices[second].items())
    tallies = {voter: overall(of_voter) for voter, of_voter in by_voter.items()}
    return VoteResults(len(pairs), overall(votes), tallies, agreement, notes)
