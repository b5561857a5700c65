"""Votes: which result they give, in which file they are, and votes that are not valid."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from review.report import votes_table
from review.votes import (
    Choice,
    Pair,
    Tally,
    Vote,
    VoteResults,
    count_votes,
    find_notes,
    find_pairs,
    overall,
    read_votes,
    update_votes,
)
from stages.runtime.errors import UserError
from tests.clone import ROOT, commit, run
from tests.conftest import predictions, revision

PAIRS = [Pair(f"id{n}", f"Say {n}.", f"old {n}", f"new {n}") for n in range(8)]
FILE = Path("votes/a..b.jsonl")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_votes(path: Path, votes: list[Vote]) -> None:
    update_votes(path, lambda earlier: [*earlier, *votes])


def vote(number: int, choice: Choice, voter: str = "Ann", voter_id: str = "1") -> Vote:
    return Vote(voter, voter_id, f"id{number}", choice, *PAIRS[number].hashes())


def side(*answers: str) -> Any:
    """A revision with these answers to the prompts id0, id1, ..."""
    return revision(predictions([1.0] * len(answers), answer=answers))


BEFORE, AFTER = side(*(pair.before for pair in PAIRS)), side(*(pair.after for pair in PAIRS))


@pytest.fixture
def path() -> Path:
    """The file for votes on `PAIRS`."""
    _, path = find_pairs(BEFORE, AFTER)
    return path


def test_only_prompts_with_different_answers_are_voted_on() -> None:
    pairs, path = find_pairs(side("a", "b", "c"), side("a", "B", "C", "d"))
    assert pairs == [Pair("id1", "Say 1.", "b", "B"), Pair("id2", "Say 2.", "c", "C")]
    # The name of the file depends on the answers alone, so a vote before a commit is found after it.
    assert find_pairs(side("a", "b", "c"), side("a", "B", "C", "d")) == (pairs, path)
    assert path != find_pairs(side("a", "b", "c"), side("a", "B", "C", "e"))[1]
    assert find_pairs(side("a"), revision(None)) is None


def test_a_prompt_counts_once_by_its_first_vote_of_a_person() -> None:
    votes = [
        vote(0, "before", "judge m", "judge"),
        vote(0, "after", "Ann"),
        vote(0, "before", "Bob"),
        vote(1, "equal", "Bob"),
        vote(2, "after", "judge m", "judge"),
    ]
    assert overall(votes) == Tally(1, 0, 1)
    assert overall([one for one in votes if one.voter_id == "judge"]) == Tally(1, 1, 0)


@pytest.mark.parametrize(
    ("tally", "low", "high", "verdict"),
    [
        (Tally(0, 0, 9), 0.0, 1.0, "undecided"),
        (Tally(6, 0, 0), 0.4736, 1.0, "undecided"),  # ∫ p⁶ over the prior is 0.2256, and (0.05 · 0.2256)^(1/6) = 0.4736
        (Tally(7, 0, 0), 0.5214, 1.0, "better"),
        (Tally(0, 7, 2), 0.0, 0.4786, "worse"),
        (Tally(10, 10, 5), 0.1930, 0.8070, "undecided"),
    ],
)
def test_the_interval_says_when_enough_votes_are_in(tally: Tally, low: float, high: float, verdict: str) -> None:
    assert tally.interval == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert tally.verdict == verdict


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_interval_contains_the_observed_share_and_is_symmetric(wins: int, losses: int) -> None:
    low, high = Tally(wins, losses, 0).interval
    if wins + losses:
        assert low <= wins / (wins + losses) <= high
    assert Tally(losses, wins, 3).interval == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_the_interval_rarely_ever_excludes_the_true_share_if_it_is_computed_after_each_vote() -> None:
    votes = np.random.default_rng(0).integers(0, 2, (500, 100)).cumsum(1)
    num_errors = sum(
        any(Tally(won, number - won, 0).log_martingale(0.5) > math.log(20) for number, won in enumerate(wins, 1))
        for wins in votes.tolist()
    )
    assert num_errors / 500 < 0.05  # a binomial test after each vote would be wrong in about a quarter


def test_votes_are_read_back_in_order() -> None:
    assert read_votes(FILE, PAIRS) == []
    votes = [vote(1, "after"), vote(0, "equal", "Zoë"), vote(1, "before", "Bob")]
    write_votes(FILE, votes)
    assert read_votes(FILE, PAIRS) == votes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "votes/a..b.jsonl:2: not a vote: "),
        ("\udcff", "votes/a..b.jsonl:2: not a vote: "),
        (
            json.dumps({"voter": "A"}),
            "votes/a..b.jsonl:2: not a vote: voter_id: Field required; correct or delete this",
        ),
        ({"choice": "both"}, "votes/a..b.jsonl:2: not a vote: choice: Input should be 'before', 'after' or 'equal'; c"),
        ("<<<<<<< HEAD", "votes/a..b.jsonl:2: not a vote: "),
    ],
)
def test_an_invalid_vote_is_reported_with_its_line(line: Any, message: str) -> None:
    write_votes(FILE, [vote(0, "after")])
    first = FILE.read_text()
    second = line if isinstance(line, str) else json.dumps(json.loads(first) | line)
    FILE.write_bytes(f"{first}{second}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        read_votes(FILE, PAIRS)
    assert str(error.value).startswith(message)
    with pytest.raises(UserError) as error:
        write_votes(FILE, [vote(1, "after")])
    assert str(error.value).startswith(f"not saved: {message}")
    assert str(error.value).endswith("; correct or delete this line, then try again")


def test_blank_lines_are_ignored() -> None:
    write_votes(FILE, [vote(0, "after"), vote(1, "equal")])
    first, second = FILE.read_bytes().splitlines()
    FILE.write_bytes(b"\r\n" + first + b"\r\n  \t\n\n" + second)
    assert read_votes(FILE, PAIRS) == [vote(0, "after"), vote(1, "equal")]


def test_votes_on_other_answers_and_second_votes_are_kept_in_the_file_but_do_not_count() -> None:
    other, unknown = Vote("Ann", "1", "id0", "after", "0", "0"), Vote("Ann", "1", "x", "after", "0", "0")
    write_votes(FILE, [other, vote(0, "before"), unknown])
    write_votes(FILE, [vote(0, "after"), vote(0, "equal", voter_id="2")])
    assert read_votes(FILE, PAIRS) == [vote(0, "before"), vote(0, "equal", voter_id="2")]
    assert len(FILE.read_text().splitlines()) == 5
    assert find_notes(FILE, PAIRS) == [
        "Votes in votes/ on other answers than those of these revisions, which do not count: 2.",
        "Second votes of a voter on a prompt in votes/a..b.jsonl, which do not count: 1.",
    ]


@pytest.mark.subprocess
def test_two_people_of_one_name_stay_two_after_a_merge_and_a_second_vote_of_a_person_does_not_count(
    tmp_path: Path, path: Path
) -> None:
    Path(".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    run(tmp_path, "git", "init", "-q", "-b", "main")
    write_votes(path, [vote(0, "after")])
    commit(tmp_path, "start")
    run(tmp_path, "git", "switch", "-q", "-c", "other")
    write_votes(path, [vote(0, "before", voter_id="2"), vote(1, "before")])
    commit(tmp_path, "votes of another Ann, and one of Ann in another clone")
    run(tmp_path, "git", "switch", "-q", "main")
    write_votes(path, [vote(1, "after"), vote(2, "after")])
    commit(tmp_path, "more votes of Ann")
    run(tmp_path, "git", "merge", "-q", "other")
    results = count_votes(BEFORE, AFTER)
    assert results is not None
    assert results.by_voter == {("Ann", "1"): Tally(3, 0, 0), ("Ann", "2"): Tally(0, 1, 0)}
    assert results.overall == Tally(3, 0, 0)
    assert results.notes == [f"Second votes of a voter on a prompt in {path}, which do not count: 1."]
    report = votes_table(results)
    assert "| Ann (1) | 3 | 0 | 0 |" in report
    assert "| Ann (2) | 0 | 1 | 0 |" in report
    assert "Ann (1) and Ann (2) agree on 0 of 1 prompts.\n\nSecond votes of a voter on a prompt in" in report


def test_a_review_without_votes_on_its_answers_notes_other_votes_and_votes_that_can_not_be_read(path: Path) -> None:
    assert count_votes(BEFORE, AFTER) is None
    write_votes(FILE, [vote(0, "after"), vote(1, "equal")])
    FILE.write_text(FILE.read_text() + "\n\n")
    assert votes_table(count_votes(BEFORE, AFTER)) == (
        "Votes in votes/ on other answers than those of these revisions, which do not count: 2."
    )
    path.write_text("{\n")
    assert votes_table(count_votes(BEFORE, AFTER)).startswith(
        f"No vote counts, because the votes can't be read: {path}:1: not a vote: "
    )


def test_no_vote_is_lost_if_several_voters_vote_at_the_same_time() -> None:
    voters = [threading.Thread(target=write_votes, args=(FILE, [vote(n, "after", f"{n}")])) for n in range(8)]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join()
    assert {one.voter for one in read_votes(FILE, PAIRS)} == {str(n) for n in range(8)}


def test_the_review_shows_all_voters_and_their_agreement(path: Path) -> None:
    write_votes(path, [vote(n, "after") for n in range(7)] + [vote(0, "equal", "B|b"), vote(1, "after", "B|b")])
    results = count_votes(BEFORE, AFTER)
    ann, bob = ("Ann", "1"), ("B|b", "1")
    assert results == VoteResults(
        8, Tally(7, 0, 0), {ann: Tally(7, 0, 0), bob: Tally(1, 0, 1)}, {(ann, bob): (2, 1)}, []
    )
    assert votes_table(results).split("\n\n") == [
        "**After was better on 7 prompts, worse on 0 and equal on 0, of 8 with different answers: ✓ better.** Share "
        "of after among the decided: 52% to 100%, a 95% confidence sequence, which is valid whenever voting ends. Each "
        "prompt counts once, by its first vote.",
        "| voter | after | before | equal | share of after |\n| --- | --- | --- | --- | --- |\n"
        "| Ann | 7 | 0 | 0 | 52% to 100% |\n| B\\|b | 1 | 0 | 1 | 3% to 100% |",
        "Ann and B\\|b agree on 1 of 2 prompts.",
    ]
    assert votes_table(None) == ""
    assert math.isclose(sum(Tally(1, 1, 0).interval), 1)
