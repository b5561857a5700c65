"""Checks of answers: declarative conditions in the data, which say whether an answer is right (docs/checks.md).

A check is an object; each key is a kind of check with its expected value, and all of them must pass. Nothing in a check
is executed as code.
"""

import json
import math
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import regex

from stages.checks.choices import first_named
from stages.checks.json_answers import has_data, is_valid, validate_schema, with_exact_values
from stages.checks.numerals import numbers
from stages.checks.words import count_words, words

TIME_LIMIT = 1.0  # seconds for a regular expression and one answer
SIZE_LIMIT, LENGTH_LIMIT = 500_000, 20_000  # of regular expressions; compiling takes up to 0.1 kB per character
REPEATS = regex.compile(r"\{\s*(\d[\d\s]*)(?:(#)|[,}])")  # with the spaces and comments of verbose regular expressions
EXAMPLE = 'must be an object such as {"contains": "Paris"} (docs/checks.md)'


class CheckTimeoutError(Exception):
    """A regular expression did not end within `TIME_LIMIT`."""


def validate_check(check: Any) -> None:
    """Validate a check.

    Raises:
        ValueError: a kind is unknown, or its value is invalid.
    """
    if not isinstance(check, dict) or not check:
        raise ValueError(f"found {shown(check)}; {EXAMPLE}")
    for kind, value in check.items():
        if kind not in KINDS:
            raise ValueError(f"found the kind {kind!r}; must be one of {', '.join(sorted(KINDS))}")
        validate, _ = KINDS[kind]
        validate(kind, value)


def passes(check: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer passes a valid check.

    Raises:
        CheckTimeoutError: a regular expression took too long for this answer.
    """
    answer = nfc(answer.strip())
    return all(KINDS[kind][1](value, answer) for kind, value in check.items())


def is_right(check: str | None, answer: str) -> bool:
    """Whether an answer passes a check that is JSON text, in time; true without a check."""
    try:
        return check is None or passes(json.loads(check), answer)
    except CheckTimeoutError:
        return False


def nfc(text: str) -> str:
    """The text in Unicode form NFC, so that é as a letter with an accent equals é as one character."""
    return unicodedata.normalize("NFC", text)


def shown(value: Any) -> str:
    """The beginning of a value as JSON, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _require(valid: bool, kind: str, value: Any, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{kind}: found {shown(value)}; must be {allowed}")


def _texts(value: Any) -> list[str]:
    return [nfc(text) for text in ([value] if isinstance(value, str) else value)]


def _validate_texts(kind: str, value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    valid = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
    _require(bool(valid), kind, value, "a string or a list of strings, none of them empty")


def _are_in(value: Any, answer: str) -> list[bool]:
    """For each of the texts, whether it is in the answer, ignoring case."""
    return [text.casefold() in answer.casefold() for text in _texts(value)]


def _validate_regex(kind: str, value: Any) -> None:
    _require(isinstance(value, str), kind, value, "a regular expression")
    if len(value) > LENGTH_LIMIT or _written_out(value) > SIZE_LIMIT:
        raise ValueError(
            f"regex: found {shown(value)}, which is too large: its length must be at most {LENGTH_LIMIT:,}, and "
            f"multiplied by its repeat counts, such as 5 in {{5}} or {{5,9}}, at most {SIZE_LIMIT:,}"
        )
    try:
        _compiled(value)
    except regex.error as error:
        raise ValueError(f"regex: found {shown(value)}, which does not compile: {error}") from None


def _written_out(pattern: str) -> float:
    """An upper bound of the length of a regular expression with its repetitions written out, as compiling does.

    Also counts that are not nested are multiplied; only a complete parser could tell.
    """
    counts = REPEATS.findall(pattern)
    if any(comment for _, comment in counts):  # it could hide more digits
        return math.inf
    return len(pattern) * math.prod(max(1, int("".join(count.split()))) for count, _ in counts)


@lru_cache(8)  # instead of the cache of the package, which could take much memory
def _compiled(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(nfc(pattern), cache_pattern=False)


def _regex(value: str, answer: str) -> bool:
    try:
        return _compiled(value).search(answer, timeout=TIME_LIMIT) is not None
    except (MemoryError, RecursionError):  # a recursive expression
        return False
    except TimeoutError:
        raise CheckTimeoutError(f"the regular expression {shown(value)} takes more than {TIME_LIMIT:g} s") from None


def _validate_number(kind: str, value: Any) -> None:
    allowed = 'a number, or {"value": 6.2, "tolerance": 0.05, "position": "last"} with the position first or last'
    fields = value if isinstance(value, dict) else {"value": value}
    numbers = [fields.get("value"), fields.get("tolerance", 0)]
    are_numbers = all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e300 for n in numbers)
    valid = are_numbers and numbers[1] >= 0 and fields.keys() <= {"value", "tolerance", "position"}
    _require(valid and fields.get("position", "last") in ("first", "last"), kind, value, allowed)


def _number(value: Any, answer: str) -> bool:
    fields = value if isinstance(value, dict) else {"value": value}
    found = numbers(answer)
    number = found[0 if fields.get("position") == "first" else -1] if found else None
    if number is None:
        return False
    expected = Fraction(str(fields["value"]))
    # An integer is exact. Other numbers are often rounded, such as 0.3333333333 for 1/3.
    tolerance = Fraction(str(fields.get("tolerance", 0))) + (abs(expected) / 10**9 if expected % 1 else 0)
    return abs(number - expected) <= tolerance


def _validate_schema(kind: str, value: Any) -> None:
    _require(isinstance(value, dict), kind, value, "a JSON schema, which is an object")
    validate_schema(value)


def _validate_choice(kind: str, value: Any) -> None:
    allowed = 'an object such as {"options": ["true", "false"], "answer": "true"}'
    valid = isinstance(value, dict) and value.keys() == {"options", "answer"} and isinstance(value["options"], list)
    valid = valid and all(isinstance(option, str) and words(option) for option in value["options"])
    _require(valid and value["answer"] in value["options"], kind, value, allowed)
    is_distinct = len({tuple(words(option)) for option in value["options"]}) == len(value["options"])
    _require(is_distinct, kind, value, "an object whose options differ in more than case and punctuation")


def _validate_max_words(kind: str, value: Any) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 and value % 1 == 0
    _require(valid, kind, value, "a whole number above 0")


@cache
def _languages() -> set[str]:
    import py3langid

    return {code for code, _ in py3langid.rank("")}


def _validate_language(kind: str, value: Any) -> None:
    valid = isinstance(value, str) and value in _languages()
    _require(valid, kind, value, "a language code of ISO 639-1, such as en or de")


def _language(value: str, answer: str) -> bool:
    import py3langid

    return bool(answer) and py3langid.classify(answer)[0] == value


def _validate_checks(kind: str, value: Any) -> None:
    _require(isinstance(value, list) and bool(value), kind, value, "a list of checks")
    for check in value:
        validate_check(check)


def _any(checks: list[dict[str, Any]], answer: str) -> bool:
    timeout = None
    for check in checks:
        try:
            if passes(check, answer):
                return True
        except CheckTimeoutError as error:
            timeout = error
    if timeout:
        raise timeout
    return False


# For each kind: a function that validates its expected value, and one that says whether an answer passes.
KINDS: dict[str, tuple[Callable[[str, Any], object], Callable[[Any, str], bool]]] = {
    "equals": (_validate_texts, lambda value, answer: answer in [text.strip() for text in _texts(value)]),
    "contains": (_validate_texts, lambda value, answer: all(_are_in(value, answer))),
    "excludes": (_validate_texts, lambda value, answer: not any(_are_in(value, answer))),
    "regex": (_validate_regex, _regex),
    "number": (_validate_number, _number),
    "json": (lambda _, value: with_exact_values(value), has_data),
    "json_schema": (_validate_schema, is_valid),
    "choice": (_validate_choice, lambda value, answer: first_named(value["options"], answer) == value["answer"]),
    "max_words": (_validate_max_words, lambda value, answer: count_words(answer) <= value),
    "language": (_validate_language, _language),
    "all": (_validate_checks, lambda checks, answer: all(passes(check, answer) for check in checks)),
    "any": (_validate_checks, _any),
}
