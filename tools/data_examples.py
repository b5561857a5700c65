"""Examples as the model sees them, for `make data`: which tokens are masked and which are supervised."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stages.data.examples import IGNORE_INDEX
from tools.data_tables import LOCATION, MARKS, Tables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SOURCES = 5  # of which an example is shown
MAX_TOKENS, MAX_TOKEN = 1000, 40  # of an example at its beginning, and as many at its end; characters of a token
SEARCHED = 50  # characters by which the end of the kept part is found in the answer
CUT_TEXT = 300  # characters on both sides of the place at which an answer is cut


def choose_examples(tables: Tables) -> dict[int, list[str]]:
    """The positions of examples of different kinds, with the kinds of each; examples of the training split first."""
    rows = tables.rows.merge(tables.raw.drop_duplicates(LOCATION)[[*LOCATION, *MARKS]], "left", LOCATION)
    # Sorted by a hash, so that the first one of a kind is a random one.
    order = rows.assign(is_other=rows["split"] != "train").sort_values(["is_other", "example_id"])
    lengths = order["prompt_tokens"] + order["answer_tokens"]
    kinds = {kind: order[kind].eq(True) for kind in MARKS}  # not known if the row is not in an outdated raw table
    kinds["several questions"] = order["num_questions"] > 1
    kinds["truncated"] = order["truncated"]
    kinds["shortest answer"] = order["answer_tokens"] == order["answer_tokens"].min()
    kinds["longest"] = lengths == lengths.max()
    for source in order["source"].unique()[:MAX_SOURCES]:
        kinds[f"from {source}"] = order["source"] == source
    chosen: dict[int, list[str]] = {}
    for kind, is_kind in kinds.items():
        rows_of_kind = order.index[is_kind]
        if len(rows_of_kind):
            row = next((row for row in rows_of_kind if row not in chosen), rows_of_kind[0])
            chosen.setdefault(row, []).append(kind)
    return chosen


def show_tokens(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """An example as parts of spans of tokens: whether a span is masked, whether a token is special, and its text.

    There are two parts if tokens in the middle are not shown.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids}
    labeled = list(zip(row["input_ids"], row["labels"], strict=True))
    num_hidden = max(0, len(labeled) - 2 * MAX_TOKENS)
    parts = []
    for part in [labeled[:MAX_TOKENS], labeled[-MAX_TOKENS:]] if num_hidden else [labeled]:
        spans = []
        for is_masked, span in groupby(part, key=lambda token: token[1] == IGNORE_INDEX):
            texts = token_texts(tokenizer, [token_id for token_id, _ in span])
            spans.append((is_masked, [({*ids} <= special, text[:MAX_TOKEN]) for ids, text in texts]))
        parts.append(spans)
    return {**row, "kinds": kinds, "parts": parts, "num_tokens": len(labeled), "num_hidden": num_hidden}


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[tuple[list[int], str]]:
    """Each token and its text; several tokens if a character consists of them.

    Some tokenizers write a space before a word only if another token precedes it, so each is decoded after the previous
    one.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    texts: list[tuple[list[int], str]] = []
    before: list[int] = []
    pending: list[int] = []
    for number, token_id in enumerate(ids, 1):
        pending = [*pending, token_id]
        text = str(decode([*before, *pending]))[len(decode(before)) :]
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) == 4 or number == len(ids):
            texts.append((pending, text))
            before, pending = pending, []
    return texts


def describe_cut(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """The end of the kept part of a truncated answer, and the beginning of the part that was cut."""
    last_masked = max(at for at, label in enumerate(row["labels"]) if label == IGNORE_INDEX)
    text = tokenizer.decode(row["input_ids"][last_masked + 1 :], clean_up_tokenization_spaces=False)
    kept = str(text).rstrip("\N{REPLACEMENT CHARACTER}")
    # A tokenizer may not restore each space, and a text without a prompt lacks its first token.
    start = row["response"].find(kept[-SEARCHED:])
    end = len(kept) if row["response"].startswith(kept) else start + len(kept[-SEARCHED:])
    cut = row["response"][end : end + CUT_TEXT] if start >= 0 else ""
    num_cut = num_tokens - len(row["input_ids"])
    return {**row, "num_tokens": num_tokens, "num_cut": num_cut, "kept": kept[-CUT_TEXT:], "cut": cut}
