"""Find questions that equal or nearly match indexed ones: MinHash and LSH find candidates, exact similarity decides.

A question is a user message. Two are equal if they have the same words, and have a similarity of 1 then. They are
near-duplicates if the Jaccard similarity of their shingles is at least 0.8, as in Lee et al. 2022, Deduplicating
Training Data Makes Language Models Better (https://arxiv.org/abs/2107.06499). That paper uses shingles of five words
for web pages. Here they have two: with five, one changed word would hide a duplicate of fewer than 49 words.

The first message of a row is compared with all messages. A later message is compared with later ones only if it has at
least `MIN_WORDS` words, because shorter ones, such as "Thanks!", depend on the conversation.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from stages.checks.words import words
from stages.data.files import read_json, remove, write_json
from stages.data.splits import normalize
from stages.data.tables import ROWS_PER_GROUP, ROWS_PER_SHARD
from stages.runtime.parallel import map_processes

THRESHOLD = 0.8
MIN_WORDS = 5
IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")  # such as soft hyphens and zero-width spaces
COMMON = 0.1  # shingles in a larger share of the questions are ignored, because they are a preamble
COMMON_SAMPLE = 1000  # questions that are sampled to count shingles
NUM_HASHES, NUM_BANDS = 64, 16  # a pair at the threshold is a candidate with probability 1 − (1 − 0.8⁴)¹⁶ = 99.98%
SEED = 42  # of the hashes; another seed would miss other pairs among the remaining 0.02%
# Random-looking odd numbers that combine the hashes of a band.
HASH_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
MIN_ESTIMATED_SIMILARITY = 0.6  # share of equal hashes; 99.99% of the pairs at the threshold reach it
MAX_CANDIDATES_PER_BAND = 512  # otherwise, if many questions share a long text, the number of pairs would be quadratic
QUESTION_FIELDS = [("question", pa.string()), ("is_first", pa.bool_())]  # normalized; whether it is its row's first
Match = tuple[float, int]  # similarity, and position in the index


class NearDuplicates:
    """An index of questions in a folder of memory-mapped files. It takes 270 bytes per question, and its text.

    questions: a table with `QUESTION_FIELDS`, and columns that say where each question is from.
    """

    def __init__(self, folder: Path):
        self.questions = pa.ipc.open_file(pa.memory_map(str(folder / "questions.arrow"))).read_all()
        self._common = set(read_json(folder / "common.json"))
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        self._is_first, self._is_long = arrays["is_first"], arrays["is_long"]
        self._text_keys, self._text_owners = arrays["text_keys"], arrays["text_owners"]
        # For each band, the sorted keys and the question that each belongs to. Processes share the mapped files; with
        # rensa's own index (RMinHashLSH), each process would need a copy of 2.5 kB per question.
        self._band_keys, self._band_owners = arrays["band_keys"], arrays["band_owners"]
        # Cached, because many questions may match the same one.
        self._shingles = lru_cache(2**14)(lambda number: shingles(self.questions["question"][number].as_py()))
        self._signatures = arrays["signatures"]  # 8 bits per hash suffice for an estimate

    @classmethod
    def build(cls, folder: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> "NearDuplicates":
        """Index the questions of tables of one schema, one table at a time."""
        remove(folder)
        folder.mkdir(parents=True)
        with pa.OSFile(str(folder / "questions.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
        table = pa.ipc.open_file(pa.memory_map(str(folder / "questions.arrow"))).read_all()
        questions, is_first = table["question"], table["is_first"].to_numpy()

        sample = questions.take(pa.array(range(0, len(questions), len(questions) // COMMON_SAMPLE + 1), pa.int64()))
        counts = Counter(shingle for question in sample.to_pylist() for shingle in shingles(question))
        # A common shingle is in at least three questions, because two with the same one may be near-duplicates.
        common = {shingle for shingle, count in counts.items() if count > max(2, COMMON * len(sample))}
        write_json(folder / "common.json", sorted(common))

        parts = [questions.slice(start, ROWS_PER_SHARD) for start in range(0, len(questions) or 1, ROWS_PER_SHARD)]
        described = zip(*map_processes(partial(_describe, common=common), parts, desc="index"), strict=True)
        text_keys, is_long, signatures = map(np.concatenate, described)
        text_owners = np.lexsort([~is_first, text_keys])  # of equal questions, those that are first in their row
        keys = np.ascontiguousarray(band_keys(signatures))  # otherwise searchsorted would copy each band
        owners = np.empty(keys.shape, np.int32)
        for band, owner in zip(keys, owners, strict=True):
            owner[:] = band.argsort(kind="stable")
            band[:] = band[owner]
        arrays = {
            "is_first": is_first,
            "is_long": is_long,
            "text_keys": text_keys[text_owners],
            "text_owners": text_owners.astype(np.int32),
            "band_keys": keys,
            "band_owners": owners,
            "signatures": signatures.astype(np.uint8),
        }
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        return cls(folder)

    def find(self, rows: Sequence[Sequence[str]]) -> list[Match | None]:
        """For the user messages of each row, the most similar indexed question; None if all are below the threshold.

        Example:
            >>> index = NearDuplicates.build(folder, [list_questions(rows, schema)], schema)
            >>> index.questions["question"].to_pylist()
            ['name a color.', 'name a river.']
            >>> index.find([["Hello!", "name a river"], ["Name a sea."]])
            [(1.0, 1), None]
        """
        keyed = [_normalize_questions(row) for row in rows]
        distinct = list(dict.fromkeys(question for row in keyed for question in row))
        all_words = [words(text) for text, _ in distinct]
        is_first = np.array([first for _, first in distinct], bool)
        is_long = np.array([len(its_words) >= MIN_WORDS for its_words in all_words], bool)
        best: list[Match] = [(0.0, 0)] * len(distinct)

        def are_comparable(queries: Any, owners: Any) -> Any:
            return is_first[queries] | self._is_first[owners] | (is_long[queries] & self._is_long[owners])

        if len(self.questions):
            keys = _text_keys([text for text, _ in distinct], all_words)
            places = np.minimum(self._text_keys.searchsorted(keys), len(self._text_keys) - 1)
            owners = self._text_owners[places]
            equal = (self._text_keys[places] == keys) & are_comparable(np.arange(len(distinct)), owners)
            best = [(1.0, owner) if same else (0.0, 0) for same, owner in zip(equal, owners.tolist(), strict=True)]
        contents = [_pairs(its_words) for its_words in all_words]
        others = [at for at, content in enumerate(contents) if not best[at][0] and not content <= self._common]
        for query, owner in self._candidates(others, [contents[at] - self._common for at in others]):
            if are_comparable(query, owner):
                # Not 1, which is for equal questions.
                similarity = min(0.99, similarity_without(self._common, contents[query], self._shingles(owner)))
                best[query] = max(best[query], (similarity, owner), key=lambda match: match[0])
        matches = dict(zip(distinct, best, strict=True))
        nearest = [max(map(matches.__getitem__, row), key=lambda match: match[0]) for row in keyed]
        return [match if match[0] >= THRESHOLD else None for match in nearest]

    def _candidates(self, numbers: list[int], contents: list[set[str]]) -> list[tuple[int, int]]:
        """Pairs of the number of one of these contents and an indexed question that are probably similar."""
        signatures = minhash(contents)
        candidates: set[tuple[int, int]] = set()
        for keys, band, owners in zip(band_keys(signatures), self._band_keys, self._band_owners, strict=True):
            starts = band.searchsorted(keys)
            counts = np.minimum(band.searchsorted(keys, "right") - starts, MAX_CANDIDATES_PER_BAND)
            queries = np.repeat(np.arange(len(contents)), counts)
            # For each query, the positions start, start + 1, ..., start + count - 1 in the sorted band.
            places = np.arange(counts.sum()) + np.repeat(starts - counts.cumsum() + counts, counts)
            matches = owners[places]
            similarity = (signatures[queries].astype(np.uint8) == self._signatures[matches]).mean(axis=1)
            likely = similarity >= MIN_ESTIMATED_SIMILARITY
            candidates.update(zip(queries[likely].tolist(), matches[likely].tolist(), strict=True))
        return [(numbers[query], match) for query, match in sorted(candidates)]


def list_questions(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The distinct user messages of rows with `questions`, each with other columns of the first row that has it."""
    # Equal questions have equal keys in the index and would use up the limit of candidates per band.
    questions: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in rows:
        for text, is_first in _normalize_questions(row["questions"]):
            questions.setdefault((text, is_first), {**row, "question": text, "is_first": is_first})
    return pa.Table.from_pylist(list(questions.values()), schema)


def similarity_without(common: set[str], first: set[str], second: set[str]) -> float:
    """The Jaccard similarity of two questions without the common shingles, of which each must have others.

    A common shingle that both have, or that only one has in addition, such as a preamble, is ignored. But if each has
    some that the other lacks, a word was replaced: "12 + 4" and "12 + 5" differ also if "+ 4" and "+ 5" are common.
    """
    shared, only_first, only_second = first & second, first - second, second - first
    replaced = 2 * min(len(only_first & common), len(only_second & common))
    size = len(shared - common)
    return size / (size + len(only_first - common) + len(only_second - common) + replaced)


def shingles(text: str) -> set[str]:
    """Pairs of adjacent words, ignoring case, punctuation and Unicode form.

    Both ends have an empty neighbor, so that changing any word changes two pairs.
    """
    return _pairs(words(text))


def jaccard(first: set[str], second: set[str]) -> float:
    """The size of the intersection divided by the size of the union; one of the sets must not be empty."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def minhash(contents: list[set[str]]) -> npt.NDArray[np.uint32]:
    """MinHash signatures, (sets, hashes). The share of equal hashes estimates the Jaccard similarity of two sets."""
    from rensa import RMinHash

    signatures = RMinHash.digests_from_token_sets(contents, NUM_HASHES, SEED)
    return np.array(signatures, np.uint32).reshape(-1, NUM_HASHES)


def band_keys(signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """A key for each band of each set, (bands, sets). Similar sets are likely to have a key in common."""
    # Four 32-bit hashes become one 64-bit key. A collision only adds a candidate.
    bands = signatures.astype(np.uint64).reshape(-1, NUM_BANDS, NUM_HASHES // NUM_BANDS) * HASH_MULTIPLIERS
    keys: npt.NDArray[np.uint64] = bands.sum(axis=2, dtype=np.uint64).T
    return keys


def _normalize_questions(texts: Sequence[str]) -> list[tuple[str, bool]]:
    """The normalized user messages of a row, and whether each is the first one."""
    return [(IGNORABLE.sub("", normalize(text)), at == 0) for at, text in enumerate(texts)]


def _pairs(its_words: list[str]) -> set[str]:
    return {f"{first} {second}" for first, second in pairwise(["", *its_words, ""])} if its_words else set()


def _text_keys(questions: list[str], all_words: list[list[str]]) -> npt.NDArray[np.uint64]:
    """A hash of the words of each question, or of its text if it has none."""
    texts = [" ".join(its_words) or text for text, its_words in zip(questions, all_words, strict=True)]
    return np.array([int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) for text in texts], np.uint64)


def _describe(
    questions: pa.ChunkedArray, common: set[str]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_], npt.NDArray[np.uint32]]:
    """For each question, the hash of its words, whether it has `MIN_WORDS` words, and its MinHash signature."""
    described = []
    for start in range(0, len(questions) or 1, ROWS_PER_GROUP):
        texts = questions.slice(start, ROWS_PER_GROUP).to_pylist()
        all_words = [words(text) for text in texts]
        is_long = np.array([len(its_words) >= MIN_WORDS for its_words in all_words], bool)
        signatures = minhash([_pairs(its_words) - common for its_words in all_words])
        described.append((_text_keys(texts, all_words), is_long, signatures))
    text_keys, is_long, signatures = map(np.concatenate, zip(*described, strict=True))
    return text_keys, is_long, signatures
