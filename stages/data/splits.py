"""Which split a row belongs to: that of its prompt, which a normalized text and its hash identify."""

import hashlib
import unicodedata
from pathlib import Path

import pyarrow as pa

from stages.runtime.params import SplitFractions

SPLITS = {name: Path(f"data/{name}.parquet") for name in ("train", "validation", "test", "retention")}


def choose_splits(batch: pa.Table, params: SplitFractions) -> list[str]:
    """The split of each row: the one that its dataset is used for, or else that of its prompt."""
    pairs = zip(batch["use"].to_pylist(), batch["prompt_id"].to_pylist(), strict=True)
    return [use or choose_split(prompt_id, params) for use, prompt_id in pairs]


def choose_split(prompt_id: str, params: SplitFractions) -> str:
    """The split of a prompt: its seeded hash, as a number in [0, 1), is compared with the fractions."""
    position = hash_position(str(params.split_seed), prompt_id)
    if position < params.test_fraction:
        return "test"
    return "validation" if position < params.test_fraction + params.validation_fraction else "train"


def hash_position(*parts: str) -> float:
    """The hash of the parts as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(":".join(parts).encode()).digest()[:8]) / 2**64


def normalize(text: str) -> str:
    """Remove differences of case, whitespace and Unicode form, so that prompts that differ only in these are equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_hash(*parts: str) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of the parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
