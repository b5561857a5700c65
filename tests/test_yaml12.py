"""YAML 1.2, as DVC reads it: other numbers and booleans than in YAML 1.1."""

import math

import pytest

from stages.runtime.yaml12 import YAMLError, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-05", 0.00001),
        ("1e5", 100_000.0),
        ("2E+3", 2000.0),
        ("1.", 1.0),
        ("3.0", 3.0),
        ("+.5", 0.5),
        ("42", 42),
        ("-7", -7),
        ("+7", 7),
        ("014", 14),
        ("1_000", 1000),
        ("0o14", 12),
        ("0x1F", 31),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("+.Inf", math.inf),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("Null", None),
        ("NULL", None),
        ("", None),
    ],
)
def test_a_scalar_of_the_core_schema_has_its_type(text: str, value: object) -> None:
    parsed = parse_yaml(f"a: {text}\n")["a"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_nan_is_a_float(text: str) -> None:
    assert math.isnan(parse_yaml(text))


# YAML 1.1 reads these as booleans and a number.
OTHERS_IN_1_1 = ("no", "No", "yes", "on", "off", "y", "12:30:45")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((f"a: {text}", {"a": text}) for text in (*OTHERS_IN_1_1, "nUll", "tRUE", "1e", "0x", "-.nan")),
        ("a: '1e-05'\nb: \"null\"\nc: ''", {"a": "1e-05", "b": "null", "c": ""}),
        ("a: {x: 1}\nb: {x: 2}\n", {"a": {"x": 1}, "b": {"x": 2}}),  # equal keys of different mappings
        ("a: é".encode(), {"a": "é"}),
    ],
)
def test_all_other_scalars_are_text_and_mappings_may_have_equal_keys(text: str | bytes, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("seed: 1\nbatch_size: 4\nseed: 1\n", "seed", 3),
        ("stages:\n  train: {deps: []}\n  split: {}\n  train: {}\n", "train", 4),
        ("a: 1\n'a': 2\n", "a", 2),
        ("- {x: 1, x: 2}\n", "x", 1),
    ],
)
def test_a_key_that_occurs_twice_is_an_error_that_names_key_and_line(text: str, key: str, line: int) -> None:
    with pytest.raises(YAMLError) as error:
        parse_yaml(text)
    assert f'found duplicate key "{key}"' in str(error.value)
    assert str(error.value).endswith("keep one of them")
    assert f", line {line}, column " in str(error.value)


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['exit 1']", "a: [1", "a: &b [*b", "a: *none"])
def test_tags_that_run_code_and_broken_syntax_are_errors(text: str) -> None:
    with pytest.raises(YAMLError):
        parse_yaml(text)


def test_a_number_of_more_digits_than_python_converts_is_an_error() -> None:
    with pytest.raises(ValueError, match="integer string conversion"):
        parse_yaml("a: " + "9" * 5000)
