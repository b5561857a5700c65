"""Near-duplicate prompts: a few changed words and other punctuation match, other questions do not."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.alpaca import render_alpaca
from stages.data.near_duplicates import NearDuplicates, jaccard, shingles

LONG = (
    "Write a short letter to the people who live next door and tell them kindly that their dog has been digging holes "
    "in your garden"
)


def build(prompts: list[str]) -> NearDuplicates:
    """Index the prompts, in two tables."""
    tables = [pa.table({"prompt": pa.array(part, pa.string())}) for part in (prompts[:2], prompts[2:])]
    with TemporaryDirectory() as folder:  # mapped files stay readable after they are deleted
        return NearDuplicates.build(Path(folder), tables, tables[0].schema)


def is_near_duplicate(prompt: str, other: str) -> bool:
    return build([other]).find([prompt]) != [None]


def test_shingles_are_pairs_of_words_without_case_and_punctuation() -> None:
    assert shingles('Say "Hello", WORLD!') == {" say", "say hello", "hello world", "world "}
    assert shingles("Hello!") == {" hello", "hello "}
    assert shingles("?!") == set()


def test_operators_and_characters_of_languages_without_spaces_are_words() -> None:
    assert shingles("5 + 3") == {" 5", "5 +", "+ 3", "3 "}
    assert shingles("写一首诗。") == {" 写", "写 一", "一 首", "首 诗", "诗 "}


def test_jaccard_similarity_is_intersection_over_union() -> None:
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5


def test_the_nearest_prompt_is_found_with_its_similarity() -> None:
    index = build([LONG + " again", LONG.replace("kindly", "politely"), "How deep is the sea?", LONG.upper()])
    assert index.find([LONG, "How deep is a lake?"]) == [(1.0, 3), None]


@pytest.mark.parametrize(
    "changed",
    [LONG.lower(), LONG + ".", "Please " + LONG, LONG.replace("kindly", "politely"), LONG.replace("short ", "")],
)
def test_a_small_change_of_a_long_prompt_is_a_near_duplicate(changed: str) -> None:
    assert is_near_duplicate(changed, LONG)


def test_one_replaced_word_in_seventeen_is_still_a_near_duplicate() -> None:
    words = "a b c d e f g h i j k l m n o p q"
    for other in (words.replace("a", "x"), words.replace("h", "x"), words.replace("q", "x")):
        assert build([words]).find([other]) == [(0.8, 0)]
        assert not is_near_duplicate(other.replace("b ", ""), words.replace("b ", ""))


@pytest.mark.parametrize(
    ("prompt", "other"),
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
def test_the_same_task_with_another_question_is_not_a_near_duplicate(prompt: str, other: str) -> None:
    assert not is_near_duplicate(prompt, other)


CHAT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("render", [CHAT.format, lambda text: render_alpaca(text)], ids=["chat", "alpaca"])
def test_the_text_of_the_template_does_not_make_prompts_similar(render: object) -> None:
    assert callable(render)
    index = build([render(text) for text in ("Name a lake.", "Spell Oslo.", "Add 2 to 7.", LONG)])
    assert index.find([render("Name a tree."), render("Greet me."), render(LONG + "!")]) == [None, None, (1.0, 3)]


def test_prompts_with_only_common_shingles_have_no_near_duplicates() -> None:
    assert build(["Go on."] * 20).find(["Go on!"]) == [None]
    assert build([]).find(["Go on.", ""]) == [None, None]


def test_common_shingles_of_a_long_list_are_found_in_a_sample() -> None:
    index = build([f"Do this at once: number {i}" for i in range(5000)])
    assert index.find(["Do this at once: number x", "do this at once, number 4321"]) == [None, (1.0, 4321)]


WORDS = st.lists(st.sampled_from(["oak", "elm", "fir", "ash", "bay", "yew", "box"]), max_size=12).map(" ".join)


@given(prompts=st.lists(WORDS, max_size=2), queries=st.lists(WORDS, max_size=4))
def test_the_best_similarity_equals_that_of_a_comparison_with_all_prompts(
    prompts: list[str], queries: list[str]
) -> None:
    for query, match in zip(queries, build(prompts).find(queries), strict=True):
        similar = [jaccard(shingles(query), shingles(p)) if query and p else 0.0 for p in prompts]
        assert (match[0] if match else 0.0) == max((s for s in similar if s >= 0.8), default=0.0)


@pytest.mark.subprocess
def test_every_process_finds_the_same_matches() -> None:
    code = (
        "from tests.test_near_duplicates import build;"
        "prompts = [' '.join(str(i * j % 23) for j in range(12)) for i in range(200)];"
        "print(build(prompts[::2]).find(prompts[1::2]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert b"(1.0, " in outputs.pop()
