"""Which prompts are nearly those of a given list? MinHash and LSH propose, the exact Jaccard similarity decides.

Two prompts are near-duplicates where the Jaccard similarity of their shingles is 0.8 or more, as in Lee et al. 2022,
Deduplicating Training Data Makes Language Models Better (https://arxiv.org/abs/2107.06499). They take five words for a
shingle of a web page; of an instruction, any change in less than 49 words would be too many. Here it is two.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

THRESHOLD = 0.8
COMMON = 0.1  # a shingle that more of the prompts have is of the template, or tells as little
COMMON_SAMPLE = 1000  # prompts in which shingles are counted
NUM_HASHES, NUM_BANDS = 64, 16  # of a pair at the threshold, 1 − (1 − 0.8⁴)¹⁶ = 99.98 % are proposed
SEED = 42  # of the hashes: no result depends on it but for the 0.02 %

# A word is a run of letters and digits, one character of Chinese and Japanese, or one sign that is not of punctuation:
# 5 + 3 is not 5 * 3.
WORD = re.compile(r"[\u3041-\u9fff]|[^\W\u3041-\u9fff]+|[^\w\s.,;:!?'\"()\[\]\u00ab\u00bb\u2018-\u201f\u3001-\u300f]")


class NearDuplicates:
    """An index of prompts: of each it holds the text and 64 hashes."""

    def __init__(self, prompts: Sequence[str]):
        from rensa import RMinHashLSH

        self._prompts = prompts
        sample = prompts[:: len(prompts) // COMMON_SAMPLE + 1]
        counts = Counter(shingle for prompt in sample for shingle in shingles(prompt))
        # At least three: a pair of near-duplicates is no template.
        self._common = {shingle for shingle, count in counts.items() if count > max(2, COMMON * len(sample))}
        self._index = RMinHashLSH(THRESHOLD, NUM_HASHES, NUM_BANDS)
        for start in range(0, len(prompts), COMMON_SAMPLE):
            contents = [self._content(prompt) for prompt in prompts[start : start + COMMON_SAMPLE]]
            for number, (content, sketch) in enumerate(zip(contents, _sketches(contents), strict=True), start):
                if content:
                    self._index.insert(number, sketch)

    def find(self, prompts: Sequence[str]) -> list[tuple[float, int] | None]:
        """For each prompt, the similarity and the place of the nearest one of the index; None where all are below 0.8.

        Example:
            >>> NearDuplicates(["Name a colour.", "Name a river."]).find(["name a river", "Name a sea."])
            [(1.0, 1), None]
        """
        contents = [self._content(prompt) for prompt in prompts]
        found: list[tuple[float, int] | None] = []
        for content, sketch in zip(contents, _sketches(contents), strict=True):
            proposed = sorted(self._index.query(sketch)) if content else []
            similar = [(jaccard(content, self._content(self._prompts[number])), number) for number in proposed]
            best = max(similar, key=lambda match: match[0], default=(0.0, 0))
            found.append(best if best[0] >= THRESHOLD else None)
        return found

    def _content(self, prompt: str) -> set[str]:
        return shingles(prompt) - self._common


def shingles(text: str) -> set[str]:
    """Pairs of neighbouring words, whatever their case, punctuation and Unicode form.

    Both ends have an empty neighbour, so that another word costs two pairs there as anywhere.
    """
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return {f"{first} {second}" for first, second in pairwise(["", *words, ""])} if words else set()


def jaccard(first: set[str], second: set[str]) -> float:
    """What two sets share of what they have together; one of them is not empty."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def _sketches(contents: list[set[str]]) -> list[object]:
    from rensa import RMinHash

    sketches: list[object] = RMinHash.from_token_sets(contents, NUM_HASHES, SEED)
    return sketches
