"""Find prompts that are near-duplicates of indexed ones: MinHash and LSH find candidates, exact similarity decides.

Two prompts are near-duplicates if the Jaccard similarity of their shingles is at least 0.8, as in Lee et al. 2022,
Deduplicating Training Data Makes Language Models Better (https://arxiv.org/abs/2107.06499). That paper uses
shingles of five words for web pages. Here they have two: with five, one changed word would hide a duplicate of fewer
than 49 words.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.data.tables import ROWS_PER_GROUP, ROWS_PER_SHARD
from stages.data.words import words
from stages.runtime.files import read_json, remove, write_json
from stages.runtime.parallel import map_processes

THRESHOLD = 0.8
COMMON = 0.1  # shingles in a larger share of the prompts are ignored, because they belong to the template
COMMON_SAMPLE = 1000  # prompts that are sampled to count shingles
NUM_HASHES, NUM_BANDS = 64, 16  # a pair at the threshold is a candidate with probability 1 − (1 − 0.8⁴)¹⁶ = 99.98%
SEED = 42  # of the hashes; another seed would miss other pairs among the remaining 0.02%
# Random-looking odd numbers that combine the hashes of a band.
HASH_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
MIN_ESTIMATED_SIMILARITY = 0.6  # share of equal hashes; 99.99% of the pairs at the threshold reach it
MAX_CANDIDATES_PER_BAND = 512  # otherwise, if many prompts share a long text, the number of pairs would be quadratic


class NearDuplicates:
    """An index of prompts in a folder of memory-mapped files. It takes 256 bytes per prompt, and its text.

    prompts: a table with the column `prompt`, and others that say where it is from.
    """

    def __init__(self, folder: Path):
        self.prompts = pa.ipc.open_file(pa.memory_map(str(folder / "prompts.arrow"))).read_all()
        self._common = set(read_json(folder / "common.json"))
        # For each band, the sorted keys and the prompt that each belongs to. Processes share the mapped files; with
        # rensa's own index (RMinHashLSH), each process would need a copy of 2.5 kB per prompt.
        self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        self._owners = np.load(folder / "owners.npy", mmap_mode="r")
        self._content = lru_cache(2**14)(self._content_of)  # many prompts may match the same one
        self._signatures = np.load(folder / "signatures.npy", mmap_mode="r")  # 8 bits per hash suffice for an estimate

    @classmethod
    def build(cls, folder: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> "NearDuplicates":
        """Index the prompts of tables of one schema, one table at a time."""
        remove(folder)
        folder.mkdir(parents=True)
        with pa.OSFile(str(folder / "prompts.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
        prompts = pa.ipc.open_file(pa.memory_map(str(folder / "prompts.arrow"))).read_all()["prompt"]

        sample = prompts.take(pa.array(range(0, len(prompts), len(prompts) // COMMON_SAMPLE + 1), pa.int64()))
        counts = Counter(shingle for prompt in sample.to_pylist() for shingle in shingles(prompt))
        # A common shingle is in at least three prompts, because two prompts with the same one may be near-duplicates.
        common = {shingle for shingle, count in counts.items() if count > max(2, COMMON * len(sample))}
        write_json(folder / "common.json", sorted(common))

        parts = [prompts.slice(start, ROWS_PER_SHARD) for start in range(0, len(prompts) or 1, ROWS_PER_SHARD)]
        sign = partial(_prompt_signatures, common=common)
        signatures = np.concatenate(list(map_processes(sign, parts, desc="index")))
        np.save(folder / "signatures.npy", signatures.astype(np.uint8))
        keys = np.ascontiguousarray(band_keys(signatures))  # otherwise searchsorted would copy each band
        owners = np.empty(keys.shape, np.int32)
        for band, owner in zip(keys, owners, strict=True):
            owner[:] = band.argsort(kind="stable")
            band[:] = band[owner]
        np.save(folder / "keys.npy", keys)
        np.save(folder / "owners.npy", owners)
        return cls(folder)

    def find(self, prompts: Sequence[str]) -> list[tuple[float, int] | None]:
        """For each prompt, the similarity and index of the nearest indexed one; None if all are below the threshold.

        Example:
            >>> table = pa.table({"prompt": ["Name a color.", "Name a river."]})
            >>> index = NearDuplicates.build(folder, [table], table.schema)
            >>> index.find(["name a river", "Name a sea."])
            [(1.0, 1), None]
        """
        contents = [shingles(prompt) - self._common for prompt in prompts]
        signatures = minhash(contents)
        candidates: set[tuple[int, int]] = set()  # positions in `prompts` and in the index
        for keys, band, owners in zip(band_keys(signatures), self._keys, self._owners, strict=True):
            starts = band.searchsorted(keys)
            counts = np.minimum(band.searchsorted(keys, "right") - starts, MAX_CANDIDATES_PER_BAND)
            queries = np.repeat(np.arange(len(prompts)), counts)
            # For each query, the positions start, start + 1, ..., start + count - 1 in the sorted band.
            places = np.arange(counts.sum()) + np.repeat(starts - counts.cumsum() + counts, counts)
            matches = owners[places]
            similarity = (signatures[queries].astype(np.uint8) == self._signatures[matches]).mean(axis=1)
            likely = similarity >= MIN_ESTIMATED_SIMILARITY
            candidates.update(zip(queries[likely].tolist(), matches[likely].tolist(), strict=True))
        best: list[tuple[float, int]] = [(0.0, 0)] * len(prompts)
        for query, match in sorted(candidates):
            if contents[query]:
                exact = jaccard(contents[query], self._content(match))
                best[query] = max(best[query], (exact, match), key=lambda found: found[0])
        return [found if found[0] >= THRESHOLD else None for found in best]

    def _content_of(self, number: int) -> set[str]:
        return shingles(self.prompts["prompt"][number].as_py()) - self._common


def shingles(text: str) -> set[str]:
    """Pairs of adjacent words, ignoring case, punctuation and Unicode form.

    Both ends have an empty neighbor, so that changing any word changes two pairs.
    """
    found = words(text)
    return {f"{first} {second}" for first, second in pairwise(["", *found, ""])} if found else set()


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


def _prompt_signatures(prompts: pa.ChunkedArray, common: set[str]) -> npt.NDArray[np.uint32]:
    starts = range(0, len(prompts) or 1, ROWS_PER_GROUP)
    parts = [prompts.slice(start, ROWS_PER_GROUP).to_pylist() for start in starts]
    return np.concatenate([minhash([shingles(prompt) - common for prompt in part]) for part in parts])
