"""Which prompts are nearly those of a given table? MinHash and LSH propose, the exact Jaccard similarity decides.

Two prompts are near-duplicates where the Jaccard similarity of their shingles is 0.8 or more, as in Lee et al. 2022,
Deduplicating Training Data Makes Language Models Better (https://arxiv.org/abs/2107.06499). They take five words for a
shingle of a web page; of an instruction, any change in less than 49 words would be too many. Here it is two.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.shared.files import ROWS_PER_GROUP, ROWS_PER_SHARD, read_json, remove, write_json
from stages.shared.processes import map_processes

THRESHOLD = 0.8
COMMON = 0.1  # a shingle that more of the prompts have is of the template, or tells as little
COMMON_SAMPLE = 1000  # prompts in which shingles are counted
NUM_HASHES, NUM_BANDS = 64, 16  # of a pair at the threshold, 1 − (1 − 0.8⁴)¹⁶ = 99.98 % are proposed
SEED = 42  # of the hashes: no result depends on it but for the 0.02 %
# Odd numbers without a pattern, by which hashes are mixed.
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
LIKELY = 0.6  # of the hashes; of the pairs at the threshold 99.99 % have as many in common
MOST_PROPOSED = 512  # by a band: where many prompts share a long text, all of them would cost their number squared

# A word is a run of letters and digits, one character of Chinese and Japanese, or one sign that is not of punctuation:
# 5 + 3 is not 5 * 3.
WORD = re.compile(r"[\u3041-\u9fff]|[^\W\u3041-\u9fff]+|[^\w\s.,;:!?'\"()\[\]\u00ab\u00bb\u2018-\u201f\u3001-\u300f]")


class NearDuplicates:
    """An index of prompts, in a folder that each process maps into its memory: 256 bytes a prompt and the text.

    prompts: a table with a column `prompt`, and others that say where it is from.
    """

    def __init__(self, folder: Path):
        self.prompts = pa.ipc.open_file(pa.memory_map(str(folder / "prompts.arrow"))).read_all()
        self._common = set(read_json(folder / "common.json"))
        # The keys of each band in order, and the prompts that they are of. Files, which processes share: of rensa's own
        # table (RMinHashLSH) each would have a copy, of 2.5 kB a prompt.
        self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        self._owners = np.load(folder / "owners.npy", mmap_mode="r")
        self._content = lru_cache(2**14)(self._content_of)  # many may be nearly the same one
        self._digests = np.load(folder / "digests.npy", mmap_mode="r")  # of each hash 8 bits: enough to estimate by

    @classmethod
    def build(cls, folder: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> "NearDuplicates":
        """Index the prompts of some tables of one schema, which are taken one by one."""
        remove(folder)
        folder.mkdir(parents=True)
        with pa.OSFile(str(folder / "prompts.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
        prompts = pa.ipc.open_file(pa.memory_map(str(folder / "prompts.arrow"))).read_all()["prompt"]

        sample = prompts.take(pa.array(range(0, len(prompts), len(prompts) // COMMON_SAMPLE + 1), pa.int64()))
        counts = Counter(shingle for prompt in sample.to_pylist() for shingle in shingles(prompt))
        # At least three: a pair of near-duplicates is no template.
        common = {shingle for shingle, count in counts.items() if count > max(2, COMMON * len(sample))}
        write_json(folder / "common.json", sorted(common))

        parts = [prompts.slice(start, ROWS_PER_SHARD) for start in range(0, len(prompts) or 1, ROWS_PER_SHARD)]
        digests = np.concatenate(list(map_processes(partial(_digest_prompts, common=common), parts, doing="index")))
        np.save(folder / "digests.npy", digests.astype(np.uint8))
        keys = np.ascontiguousarray(band_keys(digests))  # a search in a band would copy it otherwise
        owners = np.empty(keys.shape, np.int32)
        for band, owner in zip(keys, owners, strict=True):
            owner[:] = band.argsort(kind="stable")
            band[:] = band[owner]
        np.save(folder / "keys.npy", keys)
        np.save(folder / "owners.npy", owners)
        return cls(folder)

    def find(self, prompts: Sequence[str]) -> list[tuple[float, int] | None]:
        """For each prompt, the similarity and the place of the nearest one of the index; None where all are below 0.8.

        Example:
            >>> table = pa.table({"prompt": ["Name a colour.", "Name a river."]})
            >>> index = NearDuplicates.build(folder, [table], table.schema)
            >>> index.find(["name a river", "Name a sea."])
            [(1.0, 1), None]
        """
        contents = [shingles(prompt) - self._common for prompt in prompts]
        digests = digest(contents)
        proposed: set[tuple[int, int]] = set()  # places in prompts and in the index
        for keys, band, owners in zip(band_keys(digests), self._keys, self._owners, strict=True):
            starts = band.searchsorted(keys)
            counts = np.minimum(band.searchsorted(keys, "right") - starts, MOST_PROPOSED)
            asking = np.repeat(np.arange(len(prompts)), counts)
            places = np.arange(counts.sum()) + np.repeat(starts - counts.cumsum() + counts, counts)
            numbers = owners[places]
            likely = (digests[asking].astype(np.uint8) == self._digests[numbers]).mean(axis=1) >= LIKELY
            proposed.update(zip(asking[likely].tolist(), numbers[likely].tolist(), strict=True))
        best: list[tuple[float, int]] = [(0.0, 0)] * len(prompts)
        for at, number in sorted(proposed):
            if contents[at]:
                similarity = jaccard(contents[at], self._content(number))
                best[at] = max(best[at], (similarity, number), key=lambda match: match[0])
        return [match if match[0] >= THRESHOLD else None for match in best]

    def _content_of(self, number: int) -> set[str]:
        return shingles(self.prompts["prompt"][number].as_py()) - self._common


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


def digest(contents: list[set[str]]) -> npt.NDArray[np.uint32]:
    """MinHash: (sets, hashes). Two sets have as large a part of them in common as of all their members together."""
    from rensa import RMinHash

    digests = RMinHash.digests_from_token_sets(contents, NUM_HASHES, SEED)
    return np.array(digests, np.uint32).reshape(-1, NUM_HASHES)


def band_keys(digests: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """Of each set a key in each band, (bands, sets): similar sets are likely to have one in common."""
    # Four hashes of 32 bits to a key of 64: two keys that are equal by chance propose a pair, no more.
    mixed = digests.astype(np.uint64).reshape(-1, NUM_BANDS, NUM_HASHES // NUM_BANDS) * MIX
    keys: npt.NDArray[np.uint64] = mixed.sum(axis=2, dtype=np.uint64).T
    return keys


def _digest_prompts(prompts: pa.ChunkedArray, common: set[str]) -> npt.NDArray[np.uint32]:
    starts = range(0, len(prompts) or 1, ROWS_PER_GROUP)
    parts = [prompts.slice(start, ROWS_PER_GROUP).to_pylist() for start in starts]
    return np.concatenate([digest([shingles(prompt) - common for prompt in part]) for part in parts])
