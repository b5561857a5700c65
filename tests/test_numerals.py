"""Numbers are read in the notations of people and models; what is ambiguous is not read in part."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from stages.checks.numerals import numbers

GROUPED: dict[str, Callable[[str], str]] = {
    "none": lambda digits: digits,
    **{
        separator: lambda digits, to=separator: f"{int(digits):,}".replace(",", to)  # type: ignore[misc]
        for separator in (",", "{,}", ",\\!", " ", "\u00a0", "\u2009", "\u202f", "'", "’", "_", "\\,", "\uff0c")
    },
    "Indian": lambda digits: regex.sub(r"(?<=\d)(?=(?:\d\d)*\d{3}$)", ",", digits),
    "full-width": lambda digits: digits.translate({ord(str(n)): chr(0xFF10 + n) for n in range(10)}),
}
SIGNED = {"{}": 1, "+{}": 1, "-{}": -1, "−{}": -1, "–{}": -1, "-${}": -1, "$-{}": -1, "−€ {}": -1, "-US${}": -1}
SIGNED |= {"-{} €": -1, "-EUR {}": -1, "£{}": 1, "\\${}": 1}
TEXTS = [
    "{}",
    "The answer is {}.",
    "**{}**",
    r"\boxed{{{}}}",
    "${}$",
    "答案是{}。",
    "x={}",
    "2 + 2 = {}",
    "#1: {}",
    "({})",
]
TEXTS += [
    "{} km²",
    "{}%",
    "{}, because 5 < 6 (COVID-19)",
    '"{}"',
    "정답은 {}입니다",
    "| {} |",
    "- {} apples",
    "~~5~~ {}!",
]


@given(
    number=st.integers(0, 10**15),
    decimals=st.text("0123456789", max_size=6),
    group=st.sampled_from([*GROUPED]),
    sign=st.sampled_from([*SIGNED]),
    text=st.sampled_from(TEXTS),
)
def test_a_number_in_any_notation_is_read_exactly(number: int, decimals: str, group: str, sign: str, text: str) -> None:
    written = GROUPED[group](str(number)) + (f".{decimals}" if decimals else "")
    expected = SIGNED[sign] * Fraction(f"{number}.{decimals or 0}")
    found = numbers(text.format(sign.format(written)))
    assert found[0 if text.startswith("{}") else -1] == expected


@given(
    digits=st.decimals(allow_nan=False, allow_infinity=False, min_value=0, max_value=999, places=3),
    power=st.integers(-30, 30),
    form=st.sampled_from(
        [
            "{}e{}",
            "{}E{:+03}",
            "{}×10^{}",
            "{} x 10^{}",
            "{} × 10^{{{}}}",
            r"{} \times 10^{{{}}}",
            r"{}\cdot10^{{{}}}",
            "{}*10**{}",
            "{} * 10^({})",
        ]
    ),
)
def test_an_exponent_is_read_exactly(digits: object, power: int, form: str) -> None:
    assert numbers(form.format(digits, power) + " m/s") == [Fraction(str(digits)) * Fraction(10) ** power]


@given(
    whole=st.integers(1, 99),
    numerator=st.integers(1, 999),
    denominator=st.integers(1, 999),
    form=st.sampled_from(
        ["{}/{}", "{} / {}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}", "{}\u2044{}", "${}/{}$ cups"]
    ),
)
def test_a_fraction_is_read_exactly_alone_and_after_a_whole_number(
    whole: int, numerator: int, denominator: int, form: str
) -> None:
    fraction = form.format(numerator, denominator)
    assert numbers(fraction) == [Fraction(numerator, denominator)]
    if "$" not in form:
        mixed = whole + Fraction(numerator, denominator) if numerator < denominator else None
        assert numbers(f"{whole} {fraction}") == [mixed]


@given(
    first=st.integers(0, 10**6),
    second=st.integers(0, 10**6),
    between=st.sampled_from(["-", "–", "—", ":", " - ", " + ", "+", " × ", "x", "^", "**", "~", "±", "..", "_", "/1/"]),
    text=st.sampled_from(["{}", "It is {}.", "({})", "{} kg", "答案是{}。"]),
)
def test_what_joins_two_numbers_is_not_read_as_one_of_them(first: int, second: int, between: str, text: str) -> None:
    if between == "_" and len(str(second)) == 3 and first < 1000:
        return  # a separator of thousands
    if between in ("^", "**") and first == 10:
        return  # an exponent
    assert numbers(text.format(f"{first}{between}{second}")) == [None]


@given(first=st.integers(0, 10**6), second=st.integers(0, 10**6), mark=st.sampled_from([",", "\uff0c"]))
def test_a_comma_is_read_only_if_it_separates_thousands(first: int, second: int, mark: str) -> None:
    is_grouped = first < 1000 and 100 <= second < 1000
    assert numbers(f"{first}{mark}{second}") == [1000 * first + second if is_grouped else None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.234,56", [Fraction("1234.56")]),
        ("1.234.567", [1234567]),
        ("1\u202f234,5", [Fraction("1234.5")]),
        ("2½ or ¾", [Fraction(5, 2), Fraction(3, 4)]),
        (r"-\frac12", [Fraction(-1, 2)]),
        ("10³ and 10^{-2}", [1000, Fraction(1, 100)]),
        ("3 million, 2.5 Billion, 3 hundred thousand", [3 * 10**6, 25 * 10**8, 300_000]),
        ("(8)-3", [8, None]),
        ("3万5000, 3万kg-5万kg, 3万-5万", [None] * 3),
        ("3万, 2억", [30_000, 2 * 10**8]),
        ("5k, 5M, 3 million 200 thousand, 2 and 1/2, 3.141 592 653", [None] * 5),
        ("5km, 5 K, 5kg, 5千克, 25-year-old, 1st", [5, 5, 5, 5, 25, 1]),
        ("12 m², 12km2, 12 cm^2, 12㎡", [12, 12, 12, 12]),
        ("B7, H2O, COVID-19, x_1, x^2", []),
        ("√2, 2π, ±5, --5, —5", [None] * 5),
        (r"\sqrt{2} and \frac{\sqrt{2}}{3}, 2\pi", [None] * 3),
        ("π ≈ 3.14", [Fraction("3.14")]),
        ("1,5,7", [1, 5, 7]),
        ("1,2345 and 1,234,56 and 1.2.3 and 192.168.0.1", [None] * 4),
        ("1/0, 1e999, 1e999999999", [None] * 3),
        ("2024-05-01 at 12:30, 5/6/2024", [None] * 3),
        ("0x1F, 1010₂", [None] * 2),
        ("2+3=5, 9*7=63.", [None, 5, None, 63]),
        ("有3个\uff0c5元。3加4等于7", [3, 5, 3, 4, 7]),
        ("In 2024 100 people", [2024, 100]),
        ("5 -3", [5, -3]),
        ("the answer—5", [5]),
        ("\u0663\u066b\u0665", [Fraction("3.5")]),
        ("9" * 5000, [None]),
        (".5 and 5.", [Fraction(1, 2), 5]),
    ],
)
def test_numbers_of_a_text(text: str, expected: list[Fraction | int | None]) -> None:
    assert numbers(text) == expected


@given(st.text("0123456789.,-–−—+/^*×x·eE$€ '_{}\\()%√π½²₂kM万\n:~a") | st.text())
def test_any_text_has_numbers_or_none(text: str) -> None:
    assert all(number is None or isinstance(number, Fraction | int) for number in numbers(text))
