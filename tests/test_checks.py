"""Checks accept right answers and reject wrong ones; invalid checks are rejected with a message."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import download_dataset
from stages.checks.kinds import KINDS, CheckTimeoutError, passes, validate_check
from stages.data.examples import BadRowError
from stages.rows.columns import parse_check
from stages.rows.row_parser import RowParser
from tests.clone import ROOT, edit

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
        ({"number": 12193131840}, ["12,193,131,840", "1.219313184e10"], ["12193131849", "12193131840.1"]),
        ({"number": 3.5}, ["3.5", "7/2", "3 1/2", r"\frac{7}{2}"], ["3,5", "3-5", "3.50001"]),
        ({"number": 0.3333333333}, ["1/3"], ["0.3333"]),
        ({"number": {"value": 3, "tolerance": 0.1}}, ["3.1", "2.9"], ["3.1000000001"]),
        ({"equals": "caf\u00e9"}, ["cafe\u0301"], ["cafe"]),
        ({"equals": "x2"}, ["x2"], ["x\u00b2"]),
        ({"contains": "CAFE\u0301"}, ["un caf\u00e9"], ["cafe"]),
        ({"excludes": "caf\u00e9"}, ["cafe"], ["cafe\u0301"]),
        ({"regex": "^caf[e\u0301]$"}, ["cafe\u0301"], ["cafe"]),
        ({"json": {"e\u0301": "e\u0301"}}, ['{"\u00e9": "e\\u0301"}'], ['{"e": "e"}']),
        ({"json": 0.1}, ["0.1", "1e-1", "0.10"], ["0.1000000000000000001"]),
        ({"json_schema": {"multipleOf": 0.01}}, ["19.99", "3", "1e300"], ["19.999", "1e-400"]),
        ({"json_schema": {"maximum": 0.3, "enum": [0.3, 0.2]}}, ["0.30"], ["0.30000000000000000001"]),
        ({"json_schema": {"type": "integer"}}, ["3.0", "1e2"], ["3.5"]),
        ({"json_schema": {"format": "date"}}, ['"2024-02-29"', "3"], ['"2023-02-29"', '"tomorrow"']),
        ({"json_schema": {"items": {"format": "ipv4"}}}, ['["127.0.0.1"]'], ['["127.0.0.256"]']),
        ({"json": None}, ["null"], ["", "NaN", "1e999"]),
        ({"json_schema": {"type": "number"}}, ["3"], ["NaN", "Infinity", "1e999", "[" * 100_000]),
        ({"json": [1, 2]}, ["[1, 2]"], ["[2, 1]", "[1, 2, 3]", "{}"]),
        ({"json_schema": PERSON}, ['{"age": 3}'], ['{"age": "3"}', "{}", "age: 3"]),
        ({"choice": {"options": ["true", "false"], "answer": "true"}}, ["True. It is not false."], ["False, not true"]),
        ({"choice": {"options": ["true", "not true"], "answer": "not true"}}, ["That is not true."], ["It is true."]),
        ({"choice": {"options": ["a", "b"], "answer": "a"}}, ["A, because"], ["c", "banana"]),
        ({"max_words": 3}, ["One, two, three!", "Don't stop now", "A well-known 3.14"], ["One two three four"]),
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
    ("text", "data"),
    [
        ('```json \n{"a": 1}\n```', {"a": 1}),
        ('```json\r\n{"a": 1}\r\n```', {"a": 1}),
        ('```JSON title="x.json"\n{"a": 1}\n```', {"a": 1}),
        ('```json {"a": 1}```', {"a": 1}),
        ('```{"a": 1}``` is it.', {"a": 1}),
        ('~~~\n{"a": 1}\n~~~', {"a": 1}),
        ("````json\n5\n````", 5),
        ("```null```", None),
        ('Here:\n\n  ```json\n  {"a": 1}\n  ```\n\nDone. ```[2]```', {"a": 1}),
        ('```json\n{"a": "use ```x``` here"}\n```', {"a": "use ```x``` here"}),
        ('{"a": "use ```x``` here"}', {"a": "use ```x``` here"}),
        ('```json\n{"a": 1}', {"a": 1}),  # the block of an unclosed fence ends with the text
    ],
)
def test_json_is_read_in_any_fence(text: str, data: Any) -> None:
    assert passes({"json": data}, text)


@pytest.mark.parametrize(
    "text",
    ['{"a": 1} and so on', '```json\n{"a": 1} 2\n```', "```python\nf()\n```\n```[1]```", "``[1]``", "```[1]\n~~~"],
)
def test_what_is_not_only_json_is_no_json(text: str) -> None:
    assert not passes({"any": [{"json_schema": {}}]}, text)


LETTERS, ROMAN = ["A", "B", "C", "D"], ["I", "II", "III"]


@pytest.mark.parametrize(
    ("options", "answer", "named"),
    [
        (LETTERS, "A dog is no plant, so B", "B"),
        (LETTERS, "It is a dog: C", "C"),
        (LETTERS, "vitamin b, Vitamin D", "D"),
        (LETTERS, "A is right, not B.", "A"),
        (LETTERS, "The answer is A because a dog barks.", "A"),
        (LETTERS, "A. Paris", "A"),
        (LETTERS, r"\boxed{C}", "C"),
        (LETTERS, "**(D)**", "D"),
        (LETTERS, "b", "B"),
        (LETTERS, "'B'", "B"),
        (LETTERS, "b) Paris", "B"),
        (LETTERS, "C++, the U.S.A. or a B-52", None),
        (LETTERS, "정답은 B입니다.", "B"),
        (LETTERS, "答えはBです。", "B"),
        (LETTERS, "答案是B。", "B"),
        (LETTERS, "\uff22", "B"),
        (ROMAN, "So I think it's II.", "II"),
        (ROMAN, "I'd say III", "III"),
        (ROMAN, "I", "I"),
        (["서울", "부산"], "부산입니다, 서울은 아닙니다.", "부산"),
        (["서울", "부산"], "서울대학교", None),
        (["남자", "여자"], "여자였습니다", "여자"),
        (["가", "나"], "나는 가", "나"),
        (["パリ", "ローマ"], "パリス、ローマです", "ローマ"),
        (["東京", "大阪"], "答えは東京です", "東京"),
        (["5", "6"], "1.5, -5 or 6", "6"),
        (["0.45", "0.6"], "10.6 or 0.45", "0.45"),
        (["C", "C++"], "C++", "C++"),
        (["well-known", "new"], "It is WELL KNOWN.", "well-known"),
        (["yes", "no"], "I know. No.", "no"),
    ],
)
def test_the_option_that_is_named_first_counts(options: list[str], answer: str, named: str | None) -> None:
    checks = [{"choice": {"options": options, "answer": option}} for option in options]
    assert [check["choice"]["answer"] for check in checks if passes(check, answer)] == ([named] if named else [])


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
        ({"equals": 3}, "equals: found 3; must be a string or a list of strings, none of them empty"),
        ({"contains": []}, "contains: found []; must be a string or a list of strings, none of them empty"),
        ({"regex": "("}, 'regex: found "(", which does not compile: missing ) at position 1'),
        ({"excludes": " "}, 'excludes: found " "; must be a string or a list of strings, none of them empty'),
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
        (
            {"json_schema": {"properties": {"format": {"format": "email"}}}},
            "json_schema: the format 'email' is not supported; must be one of date, ipv4, ipv6, uuid",
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


@pytest.mark.parametrize(
    "pattern",
    [
        "a{1000000000}",
        "a{10000000,}",
        "(?:(?:a{1000}){1000}){1000}",
        "(?x)a{ 1 0 0 0 0 0 0 0 }",
        "(?x)a{1#}\n0000000}",
        "[ab]" * 100_000,
        "(?:a{2}" * 25 + "){2}" * 25,
        f"a{{{'9' * 5000}}}",
    ],
)
def test_a_regular_expression_that_is_too_large_is_rejected_before_it_is_compiled(pattern: str) -> None:
    with pytest.raises(BadRowError, match=r"regex: found .*, which is too large: |exceeds the limit|Exceeds the limit"):
        parse_check("'check'", {"regex": pattern})


@pytest.mark.parametrize(
    "pattern", [r"\d{4}-\d{2}-\d{2}", "a{0,1000000}", r"\{1000000\}", "[0-9a-f]{8}(-[0-9a-f]{4}){3}"]
)
def test_usual_repeat_counts_are_allowed(pattern: str) -> None:
    assert parse_check("'check'", {"regex": pattern}) == {"regex": pattern}


@pytest.mark.subprocess
def test_the_largest_regular_expressions_take_bounded_memory() -> None:
    code = (
        "import resource; from stages.checks.kinds import passes; from stages.rows.columns import parse_check\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for n in range(20): passes(parse_check('check', {'regex': f'(a){{{45000 - n}}}'}), 'a' * 1000)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(out.stdout) < 400  # MB


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


@pytest.mark.parametrize("columns", ["{prompt: q, completion: a, check: test}", "{messages: m, check: test}"])
def test_a_mapped_check_is_read_as_the_page_shows_it(project: Path, columns: str) -> None:
    assert "`{prompt: q, completion: a, check: test}`" in (ROOT / "docs/checks.md").read_text(encoding="utf-8")
    row = {"q": "Add 2, 3.", "a": "5.", "m": ["Add 2, 3.", "5."], "test": {"number": 5}}
    (project / "data/a.jsonl").write_text(json.dumps(row))
    edit(project, dataset_file="data/a.jsonl", dataset_columns=columns)
    download_dataset.main()
    assert pq.read_table("data/raw.parquet")["check"].to_pylist() == ['{"number": 5}']
