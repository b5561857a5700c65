"""A clone of the project with a tiny model and little data, in which the real commands run."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.runtime.yaml12 import parse_yaml
from tests.fork_server import run_forked

ROOT = Path(__file__).parent.parent
CODE = ("stages/", "tools/", "data/.gitignore", "models/.gitignore", "dvc.yaml", ".gitignore", ".gitattributes")
CODE += (".dvcignore", ".dvc/.gitignore", ".dvc/plots/")
DVC_CONFIG = "[core]\n    analytics = false\n    check_update = false\n    autostage = true\n"
USER_FILES = ROOT / "tests/project"  # instead of those of the workspace, which may be a project with other ones
EVERY_STAGE = [
    "check_params",
    "download_dataset",
    "download_model",
    "format",
    "score_rows",
    "split",
    "train",
    "predict@base",
    "predict@tuned",
    "evaluate@base",
    "evaluate@tuned",
    "generate@base",
    "generate@tuned",
]
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction: ### Input: ### Response: Name a colour. Red. Blue. Green. Add two and two. Four.",
]


def environment(**changes: str) -> dict[str, str]:
    """Environment variables: `tests/bin/python` and this interpreter's `dvc` on the path, an identity for git."""
    env = {**os.environ, "PATH": f"{ROOT}/tests/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {f"GIT_{who}_{what}": "test@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return env | changes


def run(folder: Path, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output. `dvc` runs in a fork of the server if there is one."""
    variables = environment(**env)
    if command[0] == "dvc" and variables.get("FORK_SERVER"):
        result = run_forked(folder, ["-m", *command], variables)
    else:
        result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def stages_run(result: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(re.findall(r"^Running stage '(.+)':", result.stdout, re.MULTILINE))


def edit(project: Path, **changes: str | None) -> None:
    """Replace the values of parameters in params.yaml by literal text; None removes the line."""
    lines = []
    for line in (project / "params.yaml").read_text().splitlines():
        name = line.split(":")[0]
        if name not in changes:
            lines.append(line)
        elif changes[name] is not None:
            lines.append(f"{name}: {changes[name]}")
    (project / "params.yaml").write_text("\n".join(lines) + "\n")


def run_pipeline(folder: Path, *stages: str) -> None:
    """Run stages in this process, all by default; `evaluate@base` is the stage evaluate with the argument base."""
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        for name in stages or EVERY_STAGE:
            stage, _, argument = name.partition("@")
            context.setattr(sys, "argv", [stage, *([argument] if argument else [])])
            importlib.import_module(f"stages.{stage}").main()


def tracked_files() -> list[str]:
    """The files of the workspace that git tracks or would add; the repository may belong to another user."""
    command = ("git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard")
    return [name for name in run(ROOT, *command).stdout.splitlines() if (ROOT / name).exists()]


def copy_tree(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def make_clone(folder: Path, tiny_model: Path, **params: str) -> Path:
    """The workspace's code and the files of tests/project, committed in a new repository; tiny model."""
    for name in tracked_files():
        if name.startswith(CODE):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    copy_tree(USER_FILES, folder)
    (folder / ".dvc/config").write_text(DVC_CONFIG)
    tiny = {
        "model_name": str(tiny_model),
        "max_length": "512",
        "max_new_tokens": "4",
        "batch_size": "2",
        "gradient_accumulation_steps": "2",
        "learning_rate": "1e-3",
        "save_steps": "8",
    }
    edit(folder, **tiny | params)
    run(folder, "git", "init", "-q", "-b", "main")
    commit(folder, "start")
    return folder


def make_tokenizer(special_tokens: list[str], **names: str) -> Any:
    """A byte-level tokenizer with 400 tokens, the special ones first.

    Args:
        names: the roles of special tokens, such as `eos_token`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special_tokens, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_tiny_model(folder: Path) -> Path:
    """A folder with a small random Llama and a byte-level tokenizer whose EOS token is also its pad token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(["<|end|>"], eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def copy_clone(source: Path, folder: Path) -> Path:
    """A copy of a clone with its results, cache and history, at a new path."""
    return Path(shutil.copytree(source, folder, symlinks=True))


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", message)


def lock_hashes(text: str) -> dict[str, str]:
    """The MD5 of each output in the text of a `dvc.lock`."""
    stages = (parse_yaml(text) or {}).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
