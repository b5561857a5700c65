"""Answers that are JSON: compared as data, or validated by a schema."""

import json
import math
from collections.abc import Iterator
from typing import Any

import regex

FENCED = regex.compile(r"```\w*\n(.*?)\n?```", regex.DOTALL)
# Keywords of a JSON schema that could read other documents, or whose regular expressions would have no time limit.
UNSUPPORTED_KEYWORDS = {"$ref", "$dynamicRef", "pattern", "patternProperties"}
NAMED_SCHEMAS, NOT_SCHEMAS = {"properties", "dependentSchemas", "$defs"}, {"enum", "const", "default", "examples"}


def answer_data(answer: str) -> Any:
    """The answer, or the first fenced block in it, as JSON data.

    Raises:
        ValueError: it is not JSON.
    """

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):  # Python also reads NaN, Infinity and 1e999
            raise ValueError(f"{text} is not a JSON number")
        return value

    fenced = FENCED.search(answer)
    try:
        return json.loads(fenced[1] if fenced else answer, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def has_data(value: Any, answer: str) -> bool:
    """Whether the answer is JSON with this value."""
    try:
        return _same_data(answer_data(answer), value)
    except ValueError:
        return False


def _same_data(found: Any, expected: Any) -> bool:
    """Equality of JSON data. Unlike in Python, true is not 1."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same_data(found[key], expected[key]) for key in expected)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same_data, found, expected))
    return bool(found == expected)


def validate_schema(value: Any) -> None:
    """Validate a schema.

    Raises:
        ValueError: it is invalid, or has a keyword that is not supported.
    """
    from jsonschema import Draft202012Validator, SchemaError

    if found := UNSUPPORTED_KEYWORDS.intersection(keywords(value)):
        raise ValueError(
            f"json_schema: {min(found)} is not supported; must be a schema without references and patterns"
        )
    try:
        Draft202012Validator.check_schema(value)
    except SchemaError as error:
        raise ValueError(f"json_schema: not a valid JSON schema: {error.message}") from None


def keywords(schema: Any) -> Iterator[str]:
    """The keywords of a JSON schema and of the schemas in it."""
    if isinstance(schema, list):
        for each in schema:
            yield from keywords(each)
    elif isinstance(schema, dict):
        yield from schema
        for keyword, value in schema.items():
            if keyword in NAMED_SCHEMAS and isinstance(value, dict):
                yield from keywords([*value.values()])
            elif keyword not in NOT_SCHEMAS:
                yield from keywords(value)


def is_valid(schema: Any, answer: str) -> bool:
    """Whether the answer is JSON that is valid under the schema."""
    from jsonschema import Draft202012Validator

    try:
        return bool(Draft202012Validator(schema).is_valid(answer_data(answer)))
    except (ValueError, OverflowError, RecursionError):
        return False
