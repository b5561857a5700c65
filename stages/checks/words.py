"""Split text of any language into words."""

import unicodedata

import regex

WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts
WORD = regex.compile(
    "|".join(
        (
            rf"[{WITHOUT_SPACES}]\p{{M}}*",
            # A word of letters and digits; a number has its sign.
            rf"(?:(?<![\p{{L}}\p{{M}}\p{{N}}])-(?=\p{{N}}))?(?:(?![{WITHOUT_SPACES}])[\p{{L}}\p{{N}}]\p{{M}}*)+",
            r"(?<=[\p{N})]\s?)-(?=\s?[\p{N}(])",  # the minus of 5 - 3
            # One symbol: an operator (5 + 3 differs from 5 * 3), a currency, or an emoji with its modifiers.
            r"[\p{Sm}\p{Sc}\p{So}*/%&#@](?:[\p{M}\U0001f3fb-\U0001f3ff]|\u200d\p{So})*",
        )
    )
)

# A word as people count them: don't, well-known, 3.14, e.g. and example.org/a are one, 5 + 3 are two.
COUNTED = regex.compile(
    rf"[{WITHOUT_SPACES}]\p{{M}}*|(?:(?![{WITHOUT_SPACES}])[\p{{L}}\p{{N}}]\p{{M}}*"
    r"(?:(?:://|(?<=\d)[,–](?=\d)|['’.@_/&+:=?%#\u200c\u2010-])(?=[\p{L}\p{N}]))?)+"
)


def words(text: str) -> list[str]:
    """The words of a text, ignoring case, punctuation and Unicode form; single characters in scripts without spaces.

    Example:
        >>> words("It's −5 °C, 巴黎!")
        ['it', 's', '-5', '°', 'c', '巴', '黎']
    """
    found: list[str] = WORD.findall(normalized(text).casefold())
    return found


def count_words(text: str) -> int:
    """The number of words as people count them, without operators and other symbols."""
    return len(COUNTED.findall(normalized(text)))


def normalized(text: str) -> str:
    """The text in Unicode form NFKC and with one kind of minus sign."""
    return unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
