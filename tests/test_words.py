"""Words of texts in several scripts."""

import pytest

from stages.checks.words import count_words, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's hat (well-known) is \u201cnew\u201d!", ["the", "cat", "s", "hat", "well", "known", "is", "new"]),
        ("", []),
        ("?! ... - \u2013", []),
        # Numbers keep their sign; a hyphen between words or numbers is no sign.
        ("-5, \u22125 and 5", ["-5", "-5", "and", "5"]),
        ("3-5 of COVID-19", ["3", "-", "5", "of", "covid", "19"]),
        ("3.14 or 1,000", ["3", "14", "or", "1", "000"]),
        # Operators and other symbols are words.
        ("5 + 3 = 4 * 2", ["5", "+", "3", "=", "4", "*", "2"]),
        ("snake_case", ["snake", "case"]),
        ("\u20ac5 at 20 \u00b0C", ["\u20ac", "5", "at", "20", "\u00b0", "c"]),
        # Combining marks belong to their letter.
        ("दीन दिन", ["दीन", "दिन"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        # Scripts without spaces: one word per character, with its marks.
        ("法国的首都是巴黎。", ["法", "国", "的", "首", "都", "是", "巴", "黎"]),
        ("コーヒーを飲む", ["コ", "ー", "ヒ", "ー", "を", "飲", "む"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("用Python写3个", ["用", "python", "写", "3", "个"]),
        ("3个苹果和2个梨", ["3", "个", "苹", "果", "和", "2", "个", "梨"]),
        ("한국어를 배워요.", ["한국어를", "배워요"]),
        # Each emoji is a word.
        ("Good 👍👍, I \u2764\ufe0f it", ["good", "👍", "👍", "i", "\u2764\ufe0f", "it"]),
    ],
)
def test_words_of_a_text(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("CAFE\u0301", "caf\u00e9"),  # a letter and a combining accent
        ("Straße", "strasse"),
        ("Привет", "привет"),
        ("ﾊ\uff9e", "\u30d0"),  # half-width kana with a voicing mark
        ("\uff21\uff22\uff23\uff11\uff12", "abc12"),  # full-width letters
    ],
)
def test_case_and_unicode_form_are_ignored_and_accents_are_not(text: str, word: str) -> None:
    assert words(text) == [word]
    assert words("cafe") != words("café")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Don't stop now", 3),
        ("A well-known co\u2011author\u2019s book", 4),
        ("3.14, 1,000 and 2010\u20132015", 4),
        ("U.S.A., e.g. a.b@c.de or https://example.org/a?b=c", 5),
        ("5 + 3 = 8", 3),
        ("20 °C, $5, 50%, C++ \u2764\ufe0f ?! ...", 5),
        ("Hello,world...what\u2014why", 4),
        ("用Python写3个", 5),
        ("한국어를 배워요.", 2),
        ("दीन दिन", 2),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", 1),
        ("", 0),
    ],
)
def test_words_are_counted_as_people_count_them(text: str, number: int) -> None:
    assert count_words(text) == number
