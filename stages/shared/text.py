"""Text from data, models and the Hub, shown as it is: it can't steer a terminal, nor become Markdown or HTML."""

import re

# Control characters but tab and line end, line separators, direction overrides (CVE-2021-42574), half surrogate pairs.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
MARKUP = re.compile(r"([\\`*_\[\]<>#|~&$])")


def printable(text: str) -> str:
    """Text with what a terminal or an editor would act on as escapes.

    Example:
        >>> printable("\\x1b[31mred")
        '\\\\x1b[31mred'
    """
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def code(text: object) -> str:
    """Markdown code on one line, which may stand in the cell of a table."""
    line = re.sub(r"\\*\|", r"\|", " ".join(printable(str(text)).split()))  # an escaped backslash would free the bar
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def block(text: str) -> str:
    """Markdown's indented block of code."""
    return "\n".join(f"    {line}" for line in printable(text).split("\n")) if text else "    (empty)"


def heading(text: str) -> str:
    """Words on one line, without markup."""
    return MARKUP.sub(r"\\\1", " ".join(printable(text).split()))
