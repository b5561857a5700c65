"""Options that an answer names, such as A or true."""

from functools import lru_cache
from itertools import pairwise

import regex

from stages.checks.words import WITHOUT_SPACES, WORD, normalized, words

ALPHABETIC = rf"(?![{WITHOUT_SPACES}]|\p{{Hangul}})[\p{{L}}\p{{M}}\p{{N}}]"
KATAKANA = r"[\p{Katakana}ー]"
# A place inside a word or a number. Another script begins another word, as in B입니다 (Korean) and Bです (Japanese).
INSIDE = "|".join(
    [rf"(?<={kind})(?={kind})" for kind in (ALPHABETIC, r"\p{Hangul}", KATAKANA)]
    + [r"(?<=\d[.,])(?=\d)", r"(?<=\d)(?=[.,]\d)", rf"(?<=(?<!{ALPHABETIC})-)(?=\d)"]
)
# Korean particles and forms of "to be" that are attached to a noun.
PARTICLES = (
    r"(?:(?<=\p{Hangul})(?:(?:은|는|이|가|을|를|의|에|도|만|과|와|랑|으?로|에서|부터|까지|보다|처럼|나|요|야|임|다|죠|일|인|것)+"
    r"|(?:이[었에라고며다지죠나야]|였|입니|예요|에요|라[고는서])\p{Hangul}*)(?!\p{Hangul}))?"
)
# At the beginning of a sentence, these letters can be words, such as articles; I can be one anywhere.
CYRILLIC = "\u0410\u0412\u0418\u041a\u041e\u0421\u0423\u042f"
SENTENCE = r"(?<=(?:^|[.!?:\n])[^\p{L}\p{N}]*.)"
WORD_FOLLOWS = rf" +(?!(?:is|ist|est|es|and|or|und|oder|et|ou|because|since)\b){ALPHABETIC}"
NOT_A_WORD = rf"(?!(?:(?<=[AEOUYÀ{CYRILLIC}]){SENTENCE}|(?<=I)){WORD_FOLLOWS})"


def first_named(options: list[str], answer: str) -> str | None:
    """The option that is named first; of two that begin at the same place, the longer one. None if there is none."""
    text = normalized(answer)
    found = [(match.start(), -match.end(), option) for option in options if (match := _pattern(option).search(text))]
    return min(found)[2] if found else None


@lru_cache(1024)
def _pattern(option: str) -> "regex.Pattern[str]":
    option_words = words(option)
    letter = option_words[0]
    if len(option_words) == 1 and len(letter) == 1 and letter != letter.upper():
        # a) and an answer that is only this letter are not ambiguous; other small letters are parts of texts.
        capital = rf"(?<!\p{{L}}['’.-]){letter.upper()}(?![+#]|[-.&'’]\p{{L}}|-\d)(?!{INSIDE}){NOT_A_WORD}"
        return regex.compile(rf"(?!{INSIDE})(?:{capital}|{letter}(?=\)))|(?<=^\P{{L}}*){letter}(?=\P{{L}}*$)")
    parts = [*WORD.finditer(normalized(option))]
    body = regex.escape(parts[0][0])
    for before, after in pairwise(parts):
        # Between words can be other punctuation than in the option.
        body += r"[^\p{L}\p{N}\p{S}]" + ("+" if before.end() < after.start() else "*") + regex.escape(after[0])
    return regex.compile(rf"(?if)(?!{INSIDE}){body}{PARTICLES}(?!{INSIDE})")
