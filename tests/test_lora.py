"""LoRA: compared with plain `peft` in a textbook loop, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from stages import train
from stages.data.examples import read_split
from stages.engine.batches import shuffled_batches
from stages.engine.loading import load_for_training
from stages.engine.lora import add_adapters, merge, save_adapter
from stages.engine.loss import summed_loss
from stages.engine.model_card import model_card
from stages.engine.models import load_model
from stages.engine.optimizer import trainable_parameters
from stages.engine.probe import choose_batches
from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit
from tests.test_loss import CONFIGS
from tests.test_train import ONE_PROCESS, assert_resumes_to_the_same_bytes, curve
from tests.textbook import textbook_steps
from tests.tiny_models import random_model, tiny_model

pytestmark = pytest.mark.usefixtures("training_inputs")
BASE, TUNED = Path("models/base"), Path("models/tuned")
IDS = torch.tensor([[5, 6, 7, 8, 9]])
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def edit_lora(finetuning: str = "lora", **changes: str) -> TrainParams:
    edit(Path.cwd(), finetuning=finetuning, lora_rank="4", lora_alpha="8", learning_rate="1e-2", **changes)
    return load_params(TrainParams)


@pytest.mark.parametrize("finetuning", ["lora", "qlora"])
def test_losses_and_adapter_equal_those_of_plain_peft_and_the_tuned_model_is_the_base_with_it_merged(
    finetuning: str,
) -> None:
    load_model(BASE).save_pretrained(BASE)  # in fp32, so that the tuned weights are not rounded
    params = edit_lora(finetuning, eval_steps="1000")
    set_seed(params.seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    quantization = NF4 if finetuning == "qlora" else None
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, quantization_config=quantization)
    model = get_peft_model(base, config).train()
    examples = read_split(Path("data/train.parquet"))
    batches = [batch for epoch in range(4) for batch in shuffled_batches(examples, 4, params.seed, epoch)]
    losses = list(textbook_steps(model, batches, params, num_warmup_steps=3))
    train.main()
    assert [found for _, found in curve("loss")] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.3
    adapter = load_file(TUNED / "adapter/adapter_model.safetensors")
    expected = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert adapter.keys() == expected.keys()
    for name, weight in expected.items():
        assert (adapter[name] - weight.cpu()).norm() <= 1e-4 * weight.norm(), name

    tuned, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (TUNED, BASE))
    untouched = base(IDS).logits
    model = PeftModel.from_pretrained(base, str(TUNED / "adapter"))
    torch.testing.assert_close(tuned(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert (tuned(IDS).logits - untouched).abs().max() > 0.1
    assert load_file(TUNED / "model.safetensors").keys() == load_file(BASE / "model.safetensors").keys()


def test_the_model_card_has_a_snippet_that_loads_the_adapter() -> None:
    edit_lora()
    train.main()
    assert {path.name for path in (TUNED / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((TUNED / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("models/base", None)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads((TUNED / "config.json").read_text())["dtype"] == "bfloat16"
    card = (TUNED / "README.md").read_text()
    assert "| fine-tuned | LoRA of rank 4, weights merged |" in card
    _, *snippets = card.split("```python\n")
    exec(snippets[-1].split("```")[0] + "assert type(model).__name__ == 'PeftModelForCausalLM'", {})


def test_model_card_and_adapter_name_a_base_model_of_the_hub_and_its_commit(tmp_path: Path) -> None:
    (BASE / "source.json").write_text(json.dumps({"model_name": "acme/base", "revision": "607a30d7"}))
    source = {"source": "acme/rows, mine.csv", "revision": f"{'0' * 40}, not stated", "license": None}
    Path("data/source.json").write_text(json.dumps(source))
    metrics = {"examples": 1, "loss": 1.0, "validation_loss": 1.0, "best_step": 1, "steps": 1}
    card = ModelCard(model_card(edit_lora(), metrics))
    assert (card.data.base_model, card.data.datasets) == ("acme/base", ["acme/rows"])
    assert 'base = AutoModelForCausalLM.from_pretrained("acme/base", revision="607a30d7")\n' in card.text
    model = load_model(BASE)
    add_adapters(model, edit_lora())
    save_adapter(model, BASE, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", "607a30d7")


def test_only_adapters_are_trained_and_kept() -> None:
    model = load_model(BASE)
    message = add_adapters(model, edit_lora(lora_target_modules="[q_proj, v_proj]"))
    # 2 layers, each with 4 × (32 + 32) parameters for q and 4 × (32 + 16) for v.
    assert (
        message == "LoRA of rank 4 on self_attn.q_proj (2), self_attn.v_proj (2): 896 of 32,288 parameters are trained"
    )
    assert sorted(trainable_parameters(model)) == [
        f"model.layers.{layer}.self_attn.{name}.lora_{letter}.default.weight"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
        for letter in "AB"
    ]
    train.main()
    (checkpoint,) = Path(".scratch/train").glob("*/step-00000020")
    tensors = load_file(checkpoint / "tensors.safetensors")
    moments = 2 * 896 + 8  # and a step count for each of 8 matrices
    assert sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith("rng")) == 896 + moments
    assert sum(tensor.numel() for tensor in load_file(checkpoint / "best.safetensors").values()) == 896


@pytest.mark.parametrize(("finetuning", "dropout", "precision"), [("lora", "0.3", "fp32"), ("qlora", "0.0", "bf16")])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    finetuning: str, dropout: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_lora(finetuning, lora_dropout=dropout, precision=precision, num_epochs="2")
    assert_resumes_to_the_same_bytes(capsys, 8, 5)
    assert (TUNED / "adapter/adapter_config.json").exists()


@pytest.mark.parametrize("name", ["c_attn", "lm_head", "norm", "proj"])
def test_an_unknown_target_module_is_an_error_that_lists_the_linear_layers(name: str) -> None:
    edit_lora(lora_target_modules=f"[q_proj, {name}]")
    with pytest.raises(UserError) as error:
        train.main()
    assert str(error.value) == (
        f"lora_target_modules: found '{name}'; must be all-linear, or a list of this model's linear layers: "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize(
    ("name", "adapted", "frozen"),
    [
        (  # peft does not support out_proj
            "mamba",
            "mixer.dt_proj (2), mixer.in_proj (2), mixer.x_proj (2): ",
            "mixer.A_log (2), mixer.conv1d (2), mixer.out_proj (2)",
        ),
        ("zamba", "linear (2), mamba.in_proj (3), mamba.out_proj (3): ", "self_attn.q_proj (1)"),  # of a shared matrix
        ("ctrl", "ffn.0 (2), ffn.2 (2), multi_head_attention.Wk (2), ", ""),  # a number as their name
    ],
)
def test_layers_that_can_not_be_adapted_stay_frozen(name: str, adapted: str, frozen: str) -> None:
    message = add_adapters(tiny_model(name), edit_lora())
    assert message.startswith(f"LoRA of rank 4 on {adapted}")
    assert frozen in message.partition("; no adapter on ")[2]


def test_naming_a_layer_that_peft_does_not_support_is_an_error() -> None:
    with pytest.raises(UserError) as error:
        add_adapters(tiny_model("mamba"), edit_lora(lora_target_modules="[in_proj, out_proj]"))
    assert str(error.value) == (
        "lora_target_modules: found 'out_proj', which peft can't adapt; must be all-linear, or a list of this "
        "model's linear layers: dt_proj, in_proj, x_proj"
    )


@pytest.mark.parametrize(("dropout", "shared"), [(0.0, True), (0.1, False)])
def test_prefixes_are_not_shared_if_adapters_have_dropout(dropout: float, shared: bool) -> None:
    model = load_model(BASE).train()
    add_adapters(model, edit_lora(lora_dropout=str(dropout)))
    batches, _, _ = choose_batches(model, read_split(Path("data/train.parquet")), 1000)
    assert batches.share_prefix is shared  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3_moe"])
def test_frozen_matrices_in_bf16_give_the_same_bits(architecture: str, tmp_path: Path) -> None:
    tiny_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path)
    found = []
    for precision in ("fp32", "bf16"):
        model = load_model(tmp_path, torch.device("cpu"), precision).train()
        add_adapters(model, edit_lora())
        for name, parameter in trainable_parameters(model).items():
            assert parameter.dtype == torch.float32
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in trainable_parameters(model).values())])
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)


def test_qlora_stores_the_linear_layers_in_4_bits_and_divides_batches_exactly() -> None:
    params = edit_lora("qlora")
    examples = read_split(Path("data/train.parquet"))
    losses = []
    for tokens in (1000, 40):
        model, _ = load_for_training(params, ONE_PROCESS)
        sizes = {name: p.numel() for name, p in model.named_parameters() if name.endswith("q_proj.base_layer.weight")}
        assert set(sizes.values()) == {32 * 32 // 2}  # two weights per byte
        batches, (message, *_), _ = choose_batches(model, examples, tokens)
        assert message == "Engine: packed batches with shared prefixes"
        losses.append(sum(summed_loss(model, batch).item() for batch in batches.micro_batches(examples)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_transposed_matrices_are_merged(tmp_path: Path) -> None:
    base = random_model(CONFIGS["gpt2"]).eval()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/source.json").write_text(json.dumps({"model_name": "tiny", "revision": None}))
    add_adapters(base, edit_lora())
    for parameter in trainable_parameters(base).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(base, tmp_path / "base", tmp_path / "adapter")
    merged = merge(tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(merged(IDS).logits, base.eval()(IDS).logits, rtol=0, atol=1e-5)


def test_full_fine_tuning_does_not_import_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    # peft itself is imported by the schedulers of transformers 5 wherever it is installed.
    edit(Path.cwd(), num_epochs="1")
    monkeypatch.setitem(sys.modules, "stages.engine.lora", None)  # importing it would fail
    train.main()
    assert TUNED.exists()
