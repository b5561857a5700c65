"""Checks accept right answers and reject wrong ones; invalid checks are rejected with a message."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.checks import KINDS, CheckTimeoutError, parse_check, passes, validate_check
from stages.data.examples import BadRowError
from stages.data.rows import RowParser

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ({"equals": "brcdbr"}, ["brcdbr", " brcdbr\n"], ["brcdbr.", "Brcdbr", ""]),
        ({"equals": ["yes", "Yes."]}, ["yes", "Yes."], ["YES", "no"]),
        ({"contains": "Canberra"}, ["It is CANBERRA."], ["Sydney"]),
        ({"contains": ["red", "blue"]}, ["Blue and red."], ["red"]),
        ({"excludes": ["very", "really"]}, ["It is good."], ["It is VERY good."]),
        ({"regex": r"\b55\b"}, ["It is 55, the sum of 1 to 10."], ["155", "It is 5."]),
        ({"regex": "(?is)anchor.*bucket"}, ["Anchor\nbucket"], ["bucket, anchor"]),
        ({"number": 1146}, ["487 + 659 = 1,146.", "1146", "1146.0"], ["1,147", "It is 1146 or 1147", "none"]),
        ({"number": 7}, ["答案是7。", "共7个", "It is _7_.", "1,5,7", "7kg"], ["17", "B7", "7.5"]),
        ({"number": 0.5}, [".5", "0.5"], ["5"]),
        ({"number": -3}, ["It is −3 °C.", "-3"], ["3", "5-3"]),
        ({"number": {"value": 6.2, "tolerance": 0.05}}, ["about 6.2 miles", "6.25", "6.214"], ["6.26", "62"]),
        ({"number": {"value": 49, "position": "first"}}, ["49, because 7 × 7 is 49 and 8 × 8 is 64"], ["7 × 7 = 49"]),
        ({"json": {"a": [1, True]}}, ['{"a": [1, true]}', '```json\n{"a": [1.0, true]}\n```'], ['{"a": [1, 1]}', "a"]),
        ({"json": None}, ["null"], ["", "NaN", "1e999"]),
        ({"json_schema": {"type": "number"}}, ["3"], ["NaN", "Infinity", "1e999", "[" * 100_000]),
        ({"json": [1, 2]}, ["[1, 2]"], ["[2, 1]", "[1, 2, 3]", "{}"]),
        ({"json_schema": PERSON}, ['{"age": 3}'], ['{"age": "3"}', "{}", "age: 3"]),
        ({"choice": {"options": ["true", "false"], "answer": "true"}}, ["True. It is not false."], ["False, not true"]),
        ({"choice": {"options": ["true", "not true"], "answer": "not true"}}, ["That is not true."], ["It is true."]),
        ({"choice": {"options": ["a", "b"], "answer": "a"}}, ["A, because"], ["c", "banana"]),
        ({"max_words": 3}, ["One, two, three!"], ["One two three four"]),
        ({"language": "de"}, ["Der Hund schläft im Garten."], ["The dog sleeps in the garden.", ""]),
        ({"contains": "a", "max_words": 2}, ["a b"], ["a b c", "b"]),
        ({"all": [{"contains": "a"}, {"contains": "b"}]}, ["a b"], ["a", "b"]),
        ({"any": [{"equals": "a"}, {"equals": "b"}]}, ["a", "b"], ["a b", "c"]),
        ({"any": [{"regex": "(a|aa)+$"}, {"equals": "a" * 60 + "b"}]}, ["a" * 60 + "b"], ["b"]),
    ],
)
def test_right_answers_pass_and_wrong_ones_do_not(check: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    validate_check(check)
    assert [answer for answer in right if not passes(check, answer)] == []
    assert [answer for answer in wrong if passes(check, answer)] == []


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("3 + 4 == 7", 'found "3 + 4 == 7"; must be an object such as {"contains": "Paris"} (docs/checks.md)'),
        ([1], 'found [1]; must be an object such as {"contains": "Paris"} (docs/checks.md)'),
        (
            {"includes": "a"},
            "found the kind 'includes'; must be one of all, any, choice, contains, equals, excludes, json, "
            "json_schema, language, max_words, number, regex",
        ),
        ({"equals": 3}, "equals: found 3; must be a text or a list of texts, none of them empty"),
        ({"contains": []}, "contains: found []; must be a text or a list of texts, none of them empty"),
        ({"regex": "("}, 'regex: found "(", which does not compile: missing ) at position 1'),
        ({"excludes": " "}, 'excludes: found " "; must be a text or a list of texts, none of them empty'),
        (
            {"json_schema": {"properties": {"pattern": {"$ref": "file:///etc/hostname"}}}},
            "json_schema: $ref is not supported; must be a schema without references and patterns",
        ),
        (
            {"json_schema": {"items": {"pattern": "(a|aa)+$"}}},
            "json_schema: pattern is not supported; must be a schema without references and patterns",
        ),
        (
            {"choice": {"options": ["A", "a."], "answer": "A"}},
            'choice: found {"options": ["A", "a."], "answer": "A"}; must be an object whose options differ in more '
            "than case and punctuation",
        ),
        ({"max_words": 0}, "max_words: found 0; must be a whole number above 0"),
        ({"language": "xx"}, 'language: found "xx"; must be a language code of ISO 639-1, such as en or de'),
        (
            {"number": True},
            'number: found true; must be a number, or {"value": 6.2, "tolerance": 0.05, "position": "last"} with the '
            "position first or last",
        ),
        (
            {"json_schema": {"type": "objec"}},
            "json_schema: not a valid JSON schema: 'objec' is not valid under any of the given schemas",
        ),
        (
            {"any": [{"choice": {"options": ["a"], "answer": "b"}}]},
            'choice: found {"options": ["a"], "answer": "b"}; must be an object such as {"options": ["true", "false"], '
            '"answer": "true"}',
        ),
    ],
)
def test_an_invalid_check_rejects_its_row_with_a_message(check: Any, message: str) -> None:
    row = {"instruction": "Add 3 and 4.", "output": "7", "check": check}
    with pytest.raises(BadRowError) as error:
        RowParser().parse(row)
    assert (error.value.reason, str(error.value)) == ("invalid_check", f"'check': {message}")


def test_a_check_can_be_an_object_or_its_json_text_and_can_have_another_column_name() -> None:
    row = {"question": "Add 3 and 4.", "answer": "7", "test": '{"number": 7}'}
    columns = {"question": "question", "answer": "answer", "check": "test"}
    assert RowParser(columns).parse(row).check == {"number": 7}
    assert RowParser().parse(row).check is None
    assert parse_check("'check'", {"number": 7}) == {"number": 7}


@pytest.mark.parametrize("value", ["", " ", "null", {}, "{}", None, float("nan"), {"contains": None, "json": None}])
def test_an_empty_check_is_none(value: Any) -> None:
    assert RowParser().parse({"instruction": "A", "output": "b", "check": value}).check is None


def test_nulls_that_parquet_adds_to_a_check_are_ignored() -> None:
    check = {"any": [{"contains": "a", "number": None}], "number": {"value": 6, "tolerance": None}, "json": None}
    assert parse_check("'check'", check) == {"any": [{"contains": "a"}], "number": {"value": 6}}


@pytest.mark.parametrize(
    "last", [{"role": "user", "content": "C"}, {"role": "assistant", "content": "D", "train": False}]
)
def test_a_check_of_an_answer_that_is_not_trained_rejects_its_row(last: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "b"}]
    more = [{"role": "user", "content": "C"}] * (last["role"] == "assistant")
    with pytest.raises(BadRowError, match=r"^'check': the last message must be an answer that is trained$"):
        RowParser().parse({"messages": [*messages, *more, last], "check": {"number": 1}})


def test_a_regular_expression_that_does_not_end_is_stopped() -> None:
    with pytest.raises(CheckTimeoutError, match=r'^the regular expression "\(a\|aa\)\+\$" takes more than 1 s$'):
        passes({"regex": "(a|aa)+$"}, "a" * 60 + "b")


@given(
    kind=st.sampled_from(sorted(KINDS)),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text() | st.just("\ud800"),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["value", "type", "a"]) | st.text(), inner),
        max_leaves=5,
    ),
    answer=st.text() | st.sampled_from(["1e999", "[" * 5000, "NaN", "3"]),
)
def test_any_value_is_a_valid_check_or_rejects_its_row(kind: str, value: Any, answer: str) -> None:
    try:
        check = parse_check("'check'", {kind: value})
    except BadRowError:
        return
    if check is not None:
        json.dumps(check, ensure_ascii=False).encode()
        passes(check, answer)
