"""Numbers in a text, in the notations of people and language models, as exact fractions."""

import math
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import Any

import regex

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES |= dict.fromkeys("万萬만", 10**4) | dict.fromkeys("亿億억", 10**8)
SUPERSCRIPTS, SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "₀₁₂₃₄₅₆₇₈₉"
# Dashes, the slash of fractions, and Arabic separators. π is a factor like √, so that 2π is not 2.
CHARACTERS = str.maketrans("−–\u2010\u2011\u2044\u066b\u066cπ", "----/.,√")
# LaTeX and typographic forms become plain ones. √ also stands for LaTeX that is not read.
REWRITES = [
    (regex.compile(pattern), to)
    for pattern, to in [
        # Spaces of other widths, and full-width characters.
        (r"[\u00a0\u2000-\u200a\u202f\ufe50-\uff5e]", lambda found: unicodedata.normalize("NFKC", found[0])),
        (f"[{SUPERSCRIPTS}]+", lambda found: "^" + found[0].translate(str.maketrans(SUPERSCRIPTS, "0123456789+-"))),
        (f"[{SUBSCRIPTS}]+", lambda found: "_" + found[0].translate(str.maketrans(SUBSCRIPTS, "0123456789"))),
        (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),
        ("[¼-¾⅐-⅞]", lambda found: unicodedata.normalize("NFKC", found[0])),
        (r"\{,\}|,\\!", ","),
        (r"\\[,;: ]|\{\\,\}", " "),
        (r"\\(?=[$%])", ""),
        (r"\\(?:times|cdot)(?![a-zA-Z]) ?", "×"),
        (r"(?<=\d)(?=\\[dtc]?frac)", " "),
        (r"\\[dtc]?frac *(?|\{(-?\d+)\} *\{(\d+)\}|(\d)(\d))", r"\1/\2"),
        (r"\\(?:[dtc]?frac|sqrt|pi)(?![a-zA-Z])", "√"),
        (r"\^ ?[{(]([-+]?\d+)[)}]", r"^\1"),
        (r"(?<=\d ?)\*\*(?= ?[-+]?\d)", "^"),
        # A list without spaces, such as 1,5,7: no separators of thousands, and no decimal comma.
        (r"(?<![\d.,])\d{1,2}(?:,\d{1,2}){2,}(?![.,]?\d)", lambda found: found[0].replace(",", ", ")),
    ]
]
LETTER = r"\p{Latin}\p{Greek}\p{Cyrillic}"  # of words; in Chinese, Japanese and Korean, a number can follow a letter
SCALE = rf"[ -]?(?:(?i:(?P<scale>hundred|thousand|million|billion|trillion)s?)(?![{LETTER}])|(?P<scale>[万萬만亿億억]))"
# What joins two numbers to something else: 3-5, 12:30, 5 - 3, 7x7, $5–$10, 3 million 200, 2 and 1/2.
JOINED = (
    rf"(?:[{LETTER}\p{{Sc}}%°]*"
    rf"(?:(?:[-—+×*/÷^:.,'’_~·⋅±]+|[ ][-+×*/÷x·⋅±][ ]|(?:{SCALE})+[ ]?|[ ]and[ ](?=\d+/))[-+]?\p{{Sc}}?)?\d"
    r"|(?<=\.\d{3}(?:[ ]\d{3})*)[ ]\d{3}(?!\d))"  # 3.141 592
)
POWER_OF_UNIT = rf"[{LETTER}]{{1,3}}\^?[23](?![\w^])"  # as in 5km2
# After a whole number: not a part of something else, of a product such as 2√3, or of 5k, 5M and 3千.
END = rf"(?!(?!{POWER_OF_UNIT}){JOINED}|[ ]?√|(?:[KkMBT]|bn|mn|[兆조百천백]|千(?![克米瓦]))(?![{LETTER}]))"
US = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:(?P<space>[ '’_])\d{3})(?:(?P=space)\d{3})*(?!\d)|\d++)"
US = rf"(?P<decimal>{US}(?:\.\d++)?|\.\d++)"
EU = r"(?P<eu>\d{1,3}(?:(?:[.]\d{3})+,\d++|(?:[.]\d{3}){2,}(?!\d)|(?:[ ]\d{3})+,(?!\d{3}(?!\d))\d++))"
NUMBER = regex.compile(
    "|".join(
        (
            # Not numbers: B7, COVID-19, x_1, m^2
            rf"(?P<name>(?<![{LETTER}\d\\])[{LETTER}]++[-_]?\{{?\d{JOINED}*+)",
            rf"(?P<exponent>(?<=[{LETTER})}}\]])\^[-+]?\d++)",
            r"(?P<number>"
            rf"(?:(?<![{LETTER}\d)\]}}%])(?P<sign>[-+])(?:[A-Z]{{0,3}}\p{{Sc}}[ ]?|[A-Z]{{3}}[ ])?)?"
            rf"(?<![{LETTER}\d.])(?>"
            rf"(?:{US}[ ]?[×x*·⋅][ ]?)?(?P<base>10)[ ]?\^[ ]?(?P<power>[-+]?\d++)"
            rf"|{US}[eE](?P<power>[-+]?\d++)"
            r"|(?:(?P<whole>\d{1,3})[ ])?(?P<numerator>\d++)[ ]?/[ ]?(?P<denominator>\d++)"
            rf"|{EU}|{US})"
            rf"{END}(?:(?:{SCALE})++{END})?+(?!{SCALE})(?:{POWER_OF_UNIT})?)",
            # What is ambiguous, or of no notation above.
            rf"(?:[-+±^]|(?<!\p{{L}})—){{0,9}}+\.?\d{JOINED}*+",
            r"√[^\s=\p{Lo}\d]*+\d[^\s=\p{Lo}]*+",
            r"(?P<name>√[^\s=\p{Lo}\d]*+)",
        )
    )
)


def numbers(text: str) -> list[Fraction | int | None]:
    """The numbers in a text, in order; None stands for digits that can't be read as one number without doubt.

    Example:
        >>> numbers("It costs -$1,146.50, or 1.5e3 for 3-5 (COVID-19).")
        [Fraction(-2293, 2), 1500, None]
    """
    for pattern, plain in REWRITES:
        text = pattern.sub(plain, text).translate(CHARACTERS)
    matches = [match for match in NUMBER.finditer(text) if not (match["name"] or match["exponent"])]
    return [_value(match) if match["number"] else None for match in matches]


def exact(text: str) -> Fraction | int:
    """The value of a number such as -1.5e3.

    Raises:
        ValueError: it is not a number, or not in the range of floating-point numbers.
    """
    approximation = float(text)
    # Beyond this range, the power of ten could take all memory.
    if not math.isfinite(approximation) or (not approximation and Decimal(text)):
        raise ValueError(f"{text[:20]} is not a number in the range of floating-point numbers")
    value = Fraction(text) if approximation else Fraction(0)
    return int(value) if value.denominator == 1 else value


def _value(match: Any) -> Fraction | int | None:
    value: Fraction | int
    try:
        if match["denominator"]:
            value = Fraction(int(match["numerator"]), int(match["denominator"]))
            if match["whole"]:  # 2 1/2
                if value >= 1:
                    return None
                value += int(match["whole"])
        else:
            digits = regex.sub("[, '’_]", "", match["decimal"] or "1")
            if match["eu"]:
                digits = regex.sub("[. ]", "", match["eu"]).replace(",", ".")
            value = exact(f"{digits}e{match['power'] or 0}")
    except (ValueError, ZeroDivisionError):
        return None
    value *= math.prod(SCALES[scale.lower()] for scale in match.captures("scale"))
    return -value if match["sign"] == "-" else value
