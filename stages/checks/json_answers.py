"""Answers that are JSON: compared as data, or validated by a schema."""

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import regex

from stages.checks.numerals import exact

FENCE = regex.compile(r"`{3,}|~{3,}")
# What follows the fence before the JSON: the name of a language, a line about the block, or nothing.
INFOS = [regex.compile(rf"{info}\s*") for info in ("[a-zA-Z]*", r"[^\n]*\n", "")]
# Keywords of a JSON schema that could read other documents, or whose regular expressions would have no time limit.
UNSUPPORTED_KEYWORDS = {"$ref", "$dynamicRef", "pattern", "patternProperties"}
FORMATS = ("date", "ipv4", "ipv6", "uuid")  # others need more packages, or accept nearly every text
NAMED_SCHEMAS, NOT_SCHEMAS = {"properties", "dependentSchemas", "$defs"}, {"enum", "const", "default", "examples"}
DECODER = json.JSONDecoder(parse_float=exact, parse_constant=exact)  # raises ValueError for NaN, Infinity and 1e999


def answer_data(answer: str) -> Any:
    """The answer, or the first fenced block in it, as JSON data with exact numbers.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        try:
            return with_exact_values(DECODER.decode(answer))
        except ValueError:
            if not (fence := FENCE.search(answer)):
                raise
        # JSON may contain a fence, so the block ends after the JSON.
        for info in INFOS:
            start = match.end() if (match := info.match(answer, fence.end())) else len(answer)
            try:
                data, end = DECODER.raw_decode(answer, start)
            except ValueError:
                continue
            after = answer[end:].lstrip()
            if not after or after.startswith(fence[0]):
                return with_exact_values(data)
        raise ValueError("the fenced block is not JSON")
    except RecursionError:
        raise ValueError("nested too deeply") from None


def with_exact_values(data: Any) -> Any:
    """JSON data with exact numbers instead of floating-point ones, and with texts in Unicode form NFC.

    Raises:
        ValueError: it has a number such as Infinity.
    """
    if isinstance(data, float):
        return exact(repr(data))
    if isinstance(data, str):
        return unicodedata.normalize("NFC", data)
    if isinstance(data, list):
        return [with_exact_values(value) for value in data]
    if isinstance(data, dict):
        return {with_exact_values(key): with_exact_values(value) for key, value in data.items()}
    return data


def has_data(value: Any, answer: str) -> bool:
    """Whether the answer is JSON with this value."""
    try:
        return _same_data(answer_data(answer), with_exact_values(value))
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

    found = list(keywords(value))
    if unsupported := UNSUPPORTED_KEYWORDS.intersection(keyword for keyword, _ in found):
        raise ValueError(
            f"json_schema: {min(unsupported)} is not supported; must be a schema without references and patterns"
        )
    try:
        Draft202012Validator.check_schema(value)
    except SchemaError as error:
        raise ValueError(f"json_schema: not a valid JSON schema: {error.message}") from None
    with_exact_values(value)
    for name in (name for keyword, name in found if keyword == "format"):
        if name not in FORMATS:
            raise ValueError(f"json_schema: the format {name!r} is not supported; must be one of {', '.join(FORMATS)}")


def keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """The keywords of a JSON schema and of the schemas in it, with their values."""
    if isinstance(schema, list):
        for part in schema:
            yield from keywords(part)
    elif isinstance(schema, dict):
        yield from schema.items()
        for keyword, value in schema.items():
            if keyword in NAMED_SCHEMAS and isinstance(value, dict):
                yield from keywords([*value.values()])
            elif keyword not in NOT_SCHEMAS:
                yield from keywords(value)


def is_valid(schema: Any, answer: str) -> bool:
    """Whether the answer is JSON that is valid under the schema."""
    from jsonschema import Draft202012Validator, FormatChecker

    validator = Draft202012Validator(with_exact_values(schema), format_checker=FormatChecker(FORMATS))
    try:
        return bool(validator.is_valid(answer_data(answer)))
    except (ValueError, OverflowError, RecursionError):
        return False
