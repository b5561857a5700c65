"""Escape text from data, models and the Hub, so that it can't control a terminal or become Markdown or HTML."""

import re

# Control characters except tab and newline, line separators, text direction overrides (CVE-2021-42574), lone
# surrogates, and what XML does not allow, so that text can be part of an SVG.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
MARKUP = re.compile(r"([\\`*_\[\]<>#|~&$])")


def printable(text: str) -> str:
    """Replace characters that control a terminal or an editor with escape sequences.

    Example:
        >>> printable("\\x1b[31mred")
        '\\\\x1b[31mred'
    """
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def code(text: object) -> str:
    """The text as inline Markdown code on one line, safe inside a table cell."""
    line = " ".join(printable(str(text)).split()) or " "  # two backticks without text would begin a longer fence
    line = re.sub(r"\\*\|", r"\|", line)  # `\\|` would end the cell
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def block(text: str) -> str:
    """The text as an indented Markdown code block."""
    return "\n".join(f"    {line}" for line in printable(text).split("\n")) if text else "    (empty)"


def heading(text: str) -> str:
    """The text on one line, with its Markdown markup escaped."""
    return MARKUP.sub(r"\\\1", " ".join(printable(text).split()))
