"""Template, tokenise, mask: `data/raw.parquet` → `data/formatted.parquet`.

Every row that can't be trained on goes to the ledger `data/left_out.parquet` with the reason. Rows stream in batches.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.shared.errors import UserError, run
from stages.shared.examples import FORMATTED, LEFT_OUT, NOT_SUPERVISED
from stages.shared.files import parquet_writer, read_batches, write_json, write_text
from stages.shared.masking import encode_examples
from stages.shared.params import FormatParams, load_params
from stages.shared.templates import render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH_BIN = 16  # tokens, the width of a bar in the plot of lengths


def main() -> None:
    params = load_params(FormatParams)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("models/tokenizer", local_files_only=True)
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    first_left_out = ""

    with (
        parquet_writer(Path("data/formatted.parquet"), FORMATTED) as formatted,
        parquet_writer(Path("data/left_out.parquet"), LEFT_OUT) as ledger,
    ):

        def leave_out(entry: dict[str, Any]) -> None:
            nonlocal first_left_out
            first_left_out = first_left_out or f"row {entry['source_row']}: {entry['reason']}: {entry['detail']}"
            left_out[entry["reason"]] += 1
            ledger.write([entry])

        for batch in read_batches(Path("data/unreadable.parquet")):
            for entry in batch:
                leave_out(entry)
        for batch in read_batches(Path("data/raw.parquet")):
            for row in format_rows(batch, tokenizer, params):
                if "reason" in row:
                    leave_out(row)
                    continue
                formatted.write([row])
                counts["truncated"] += row["truncated"]
                counts["tokens"] += len(row["input_ids"])
                counts["supervised_tokens"] += sum(label != NOT_SUPERVISED for label in row["labels"])
                lengths[len(row["input_ids"]) // LENGTH_BIN] += 1

        source = json.loads(Path("data/source.json").read_text(encoding="utf-8"))
        kept, rows_in = formatted.num_rows, source["rows"]
        assert rows_in == kept + left_out.total(), "a row vanished"  # noqa: S101
        if left_out.total() > rows_in / 2:
            raise UserError(
                f"{source['source']}: {left_out.total():,} of {rows_in:,} rows can't be trained on "
                f"({_listed(left_out)}); more than half is no accident: mend the source. First, {first_left_out}"
            )

    metrics = {"rows_in": rows_in, "kept": kept, "left_out": left_out.total(), **counts}
    write_json(Path("metrics/format.json"), {**metrics, "left_out_by_reason": dict(sorted(left_out.items()))})
    bars = (f"{index * LENGTH_BIN},{lengths[index]}\n" for index in range(max(lengths) + 1))
    write_text(Path("metrics/lengths.csv"), "tokens,examples\n" + "".join(bars))
    print(
        f"{rows_in:,} rows → {kept:,} kept, {left_out.total():,} left out ({_listed(left_out) or 'none'}), "
        f"{counts['truncated']:,} truncated; {counts['tokens']:,} tokens, {counts['supervised_tokens']:,} supervised"
    )


def format_rows(
    rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", params: FormatParams
) -> Iterator[dict[str, Any]]:
    """A row of `FORMATTED` for each row that can be trained on, a row of `LEFT_OUT` for each other, in order."""
    prompts = [render_prompt(params.template, row["instruction"], row["input"]) for row in rows]
    responses = [row["output"].strip() for row in rows]
    encoded = encode_examples(tokenizer, prompts, responses, params.max_length)
    for row, prompt, response, example in zip(rows, prompts, responses, encoded, strict=True):
        if not row["instruction"].strip():
            yield _left_out(row, "empty_instruction", "'instruction' is empty")
        elif not response:
            yield _left_out(row, "empty_response", "'output' is empty")
        elif example is None:
            yield _left_out(row, "prompt_too_long", f"the prompt leaves no room in max_length = {params.max_length}")
        else:
            prompt_id = content_hash(normalise(row["instruction"]), normalise(row["input"]))
            yield {
                "example_id": content_hash(prompt_id, response),
                "prompt_id": prompt_id,
                "source_row": row["source_row"],
                "prompt": prompt,
                "response": response,
                "input_ids": example.input_ids,
                "labels": example.labels,
                "truncated": example.truncated,
            }


def normalise(text: str) -> str:
    """Text by which prompts count as equal: whatever their case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_hash(*parts: str) -> str:
    """32 hexadecimal digits, from the parts alone."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _left_out(row: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
    return {"source_row": row["source_row"], "reason": reason, "detail": detail}


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())


if __name__ == "__main__":
    run(main)
