"""Equal and nearly equal questions: a few changed words and other punctuation match, other questions do not."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.checks.near_duplicates import (
    QUESTION_FIELDS,
    NearDuplicates,
    jaccard,
    list_questions,
    shingles,
    similarity_without,
)
from stages.templates.alpaca import render_alpaca

LONG = (
    "Write a short letter to the people who live next door and tell them kindly that their dog has been digging holes "
    "in your garden"
)


def build(*rows: list[str]) -> NearDuplicates:
    """Index the user messages of rows, in two tables."""
    schema = pa.schema(QUESTION_FIELDS)
    tables = [list_questions([{"questions": row} for row in part], schema) for part in (rows[:2], rows[2:])]
    with TemporaryDirectory() as folder:  # mapped files stay readable after they are deleted
        return NearDuplicates.build(Path(folder), tables, schema)


def find(indexed: Sequence[str], queries: Sequence[str]) -> list[tuple[float, int] | None]:
    """Compare rows of one question each."""
    return build(*([question] for question in indexed)).find([[question] for question in queries])


def match(row: list[str], other: list[str]) -> bool:
    """Whether the user messages of two rows match, which must not depend on which of them is indexed."""
    found = build(other).find([row]) != [None]
    assert found == (build(row).find([other]) != [None])
    return found


def test_shingles_are_pairs_of_words_without_case_and_punctuation() -> None:
    assert shingles('Say "Hello", WORLD!') == {" say", "say hello", "hello world", "world "}
    assert shingles("Hello!") == {" hello", "hello "}
    assert shingles("?!") == set()


def test_operators_and_characters_of_languages_without_spaces_are_words() -> None:
    assert shingles("5 + 3") == {" 5", "5 +", "+ 3", "3 "}
    assert shingles("写一首诗。") == {" 写", "写 一", "一 首", "首 诗", "诗 "}


def test_jaccard_similarity_is_intersection_over_union() -> None:
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5


def test_the_nearest_question_is_found_with_its_similarity() -> None:
    indexed = [LONG + " again", LONG.replace("kindly", "politely"), "How deep is the sea?", LONG.upper()]
    assert find(indexed, [LONG, "How deep is a lake?"]) == [(1.0, 3), None]


@pytest.mark.parametrize(
    "changed",
    [LONG.lower(), LONG + ".", "Please " + LONG, LONG.replace("kindly", "politely"), LONG.replace("short ", "")],
)
def test_a_small_change_of_a_long_question_is_a_near_duplicate(changed: str) -> None:
    assert match([changed], [LONG])


def test_one_replaced_word_in_seventeen_is_still_a_near_duplicate() -> None:
    words = "a b c d e f g h i j k l m n o p q"
    for other in (words.replace("a", "x"), words.replace("h", "x"), words.replace("q", "x")):
        assert find([words], [other]) == [(0.8, 0)]
        assert not match([other.replace("b ", "")], [words.replace("b ", "")])


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("What is the square root of 16?", "What is the square root of 169?"),
        ("What is 12 + 5, in one word please?", "What is 12 * 5, in one word please?"),
        ("What is the capital of Norway?", "What is the capital of Sweden?"),
        (
            "Rewrite the sentence with a simile: He is very tall.",
            "Rewrite the sentence with a simile: He is very brave.",
        ),
    ],
)
def test_the_same_task_with_another_question_is_not_a_near_duplicate(question: str, other: str) -> None:
    assert not match([question], [other])


@pytest.mark.parametrize(
    "changed",
    [
        "what is 3 + 4",
        "  What\n\nis\u00a03  +  4 ?",
        "\uff37\uff48\uff41\uff54 is \uff13 \uff0b \uff14\uff1f",  # full-width forms
        "“What is 3 + 4?”",
        "Wh\u00adat is\u200b 3 + 4?\ufeff",  # a soft hyphen, a zero-width space and a byte order mark
    ],
)
def test_equal_questions_are_found_although_all_of_their_words_are_common(changed: str) -> None:
    sums = [f"What is {a} + {b}?" for a in range(1, 10) for b in range(1, 10)]
    assert find(sums, [changed, "What is 4 + 3?", "What is 3 + 10?"]) == [(1.0, 21), (1.0, 29), None]
    assert find([question for question in sums if question != "What is 4 + 3?"], ["What is 4 + 3?"]) == [None]


def test_whitespace_does_not_hide_a_minus() -> None:
    assert match(["5 - 3"], ["5  -  3"])
    assert not match(["5 - 3"], ["5 3"])


def test_questions_without_words_match_if_they_are_equal() -> None:
    assert find(["?", "Why?", "👍"], ["??", "?", "👍🏽", "👍"]) == [None, (1.0, 0), None, (1.0, 2)]


def test_questions_in_languages_without_spaces_are_compared_by_character() -> None:
    assert match(["写一首关于春天的诗。"], ["你好", "写一首关于春天的诗"])
    assert not match(["写一首关于春天的诗。"], ["写一首关于冬天的诗。"])


def test_the_first_message_of_a_row_is_compared_with_every_message() -> None:
    assert match(["3 + 4?"], ["Hello!", "3 + 4?"])
    assert match(["3 + 4?", "And 4 + 4?"], ["3 + 4?", "Thanks!"])
    assert match([LONG], ["Hello!", "Thanks!", LONG + ", please"])


def test_later_messages_are_compared_with_each_other_if_they_have_five_words() -> None:
    assert match(["Hello!", "What is 3 + 4?"], ["Good morning!", "what is 3 + 4"])
    assert match(["Hello!", LONG + " now"], ["Good morning!", LONG])
    assert not match(["Name a lake.", "Can you shorten it?"], ["Name a river.", "Can you shorten it?"])
    # The third row has the question as its first message; its words are common.
    assert build(["Hi", "3 + 4"], ["Hi", "3 + 4!"], ["3 + 4?"]).find([["Hello", "3 + 4?"]]) == [(1.0, 3)]


def test_a_preamble_that_only_the_indexed_questions_have_is_ignored() -> None:
    preamble = "Think about the question step by step and then answer in one sentence. "
    questions = [
        "Which harbour town did captain Morland sail from in spring?",
        "Who painted the ceiling of the largest chapel in Rome?",
        "Which metal melts at the lowest temperature of all?",
    ]
    found = find([preamble + question for question in questions], [*questions, preamble + "Where is Oslo?"])
    assert [match and match[1] for match in found] == [0, 1, 2, None]


def test_a_replaced_common_word_is_a_difference() -> None:
    common = {"+ 4", "4 ", "+ 5", "5 "}
    assert similarity_without(common, shingles("12 + 4"), shingles("12 + 5")) == 2 / 6
    skewed = [f"What is {a} + {b}?" for a in range(10, 100) for b in range(1, 9)]
    assert find(skewed, ["What is 12 + 9?", "What is 12 + 8?"]) == [None, (1.0, 23)]


CHAT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("render", [CHAT.format, lambda text: render_alpaca(text)], ids=["chat", "alpaca"])
def test_the_text_of_the_template_does_not_make_prompts_similar(render: object) -> None:
    assert callable(render)
    indexed = [render(text) for text in ("Name a lake.", "Spell Oslo.", "Add 2 to 7.", LONG)]
    queries = [render("Name a tree."), render("Greet me."), render(LONG + "!")]
    assert find(indexed, queries) == [None, None, (1.0, 3)]


def test_no_question_matches_in_an_empty_index() -> None:
    assert find([], ["Go on.", ""]) == [None, None]


def test_common_shingles_of_a_long_list_are_found_in_a_sample() -> None:
    indexed = [f"Do this at once: number {i}" for i in range(5000)]
    queries = ["Do this at once: number x", "do this at once, number 4321", "do this at once, number 4321 x"]
    assert find(indexed, queries) == [None, (1.0, 4321), None]


WORDS = st.lists(st.sampled_from(["oak", "elm", "fir", "ash", "bay", "yew", "box"]), max_size=12).map(" ".join)


@given(indexed=st.lists(WORDS, max_size=2), queries=st.lists(WORDS, max_size=4))
def test_the_best_similarity_equals_that_of_a_comparison_with_all_questions(
    indexed: list[str], queries: list[str]
) -> None:
    for query, match in zip(queries, find(indexed, queries), strict=True):
        similar = [jaccard(shingles(query), shingles(p)) if query and p else float(query == p) for p in indexed]
        assert (match[0] if match else 0.0) == max((s for s in similar if s >= 0.8), default=0.0)


@pytest.mark.subprocess
def test_every_process_finds_the_same_matches() -> None:
    code = (
        "from tests.test_near_duplicates import find;"
        "questions = [' '.join(str(i * j % 23) for j in range(12)) for i in range(200)];"
        "print(find(questions[::2], questions[1::2]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert b"(1.0, " in outputs.pop()
