"""LoRA on mixtures of experts: every matrix has an adapter or is named, and plain `peft` loads what was trained."""

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stages.engine.loading import load_for_training
from stages.engine.lora import add_adapters, count_names, merge, save_adapter, without_gradient
from stages.engine.models import load_model
from stages.engine.optimizer import trainable_parameters
from stages.runtime.errors import UserError
from tests.test_lora import BASE, TUNED, edit_lora
from tests.test_train import ONE_PROCESS, assert_resumes_to_the_same_bytes, curve
from tests.tiny_models import NOT_BUILT, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("project")
CPU = torch.device("cpu")
IDS = torch.arange(5, 29).reshape(2, 12)

MIXTURES = """
afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 doge
dots1 dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite
glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4
inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4 llama4_text longcat_flash mellum
mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text solar_open zaya
""".split()  # noqa: SIM905 (a list would have a line for each)
# What has an adapter and what has none.
DENSE = "self_attn.k_proj (2), self_attn.o_proj (2), self_attn.q_proj (2), self_attn.v_proj (2)"
FUSED = "experts.down_proj (2), experts.gate_up_proj (2)"
SHARED = "shared_experts.down_proj (1), shared_experts.gate_proj (1), shared_experts.up_proj (1)"
FIRST = "experts.down_proj (1), experts.gate_up_proj (1), mlp.down_proj (1), mlp.gate_proj (1), mlp.up_proj (1)"
EXPECTED = {
    "mixtral": (f"{FUSED}, {DENSE}", "mlp.gate (2)"),
    "gpt_oss": (f"{FUSED}, {DENSE}", "experts.down_proj_bias (2), experts.gate_up_proj_bias (2), mlp.router (2)"),
    "phimoe": (f"{FUSED}, {DENSE}", "mlp.router (2)"),
    "qwen3_moe": (f"{FIRST}, {DENSE}", "mlp.gate (1)"),  # its first layer is not a mixture
    "glm4_moe": (f"{FIRST}, {DENSE}, {SHARED}", "mlp.gate (1)"),
    # In loading, peft takes the names of its shared experts for old ones.
    "laguna": (f"{FIRST}, self_attn.g_proj (2), {DENSE}", f"mlp.gate (1), {SHARED}"),
    "dbrx": ("attn.Wqkv (2), attn.out_proj (2), router.layer (2)", "mlp.v1 (2), mlp.w1 (2), mlp.w2 (2)"),
    "jetmoe": (
        "experts.input_linear (2), experts.output_linear (2), mlp.input_linear (2), mlp.output_linear (2), "
        "router.layer (4), self_attention.kv_proj (2)",
        "",
    ),
}

# Layers that choose keys or experts, whose gradient is 0, and one whose weight Jamba reads without calling the layer.
WITHOUT_GRADIENT = ("indexer.", "scorer.", "router.classifier", "mamba.dt_proj", "qkv_proj.", "self_attn.dt_proj")


def test_all_mixtures_of_transformers_are_tried() -> None:
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_BUILT)
    assert sorted(name for name in names if "expert" in str(tiny_config(name).to_dict())) == MIXTURES


@pytest.mark.parametrize("name", MIXTURES)
def test_what_the_message_names_is_trained_merged_and_loaded_by_plain_peft(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "base")
    (tmp_path / "base/source.json").write_text(json.dumps({"model_name": "tiny", "revision": None}))
    model = load_model(tmp_path / "base", CPU).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = add_adapters(model, edit_lora())

    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(trainable_parameters(model).values(), 0.05).step()
    save_adapter(model, tmp_path / "base", tmp_path / "adapter")
    expected = model.eval()(IDS).logits

    base = load_model(tmp_path / "base", CPU).eval()
    before = {key: weight.clone() for key, weight in base.named_parameters()}
    assert (base(IDS).logits - expected).abs().max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=1e-5)

    merged = merge(tmp_path / "base", tmp_path / "adapter").eval()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-4)
    changed = {key for key, weight in merged.named_parameters() if not torch.equal(weight, before[key])}
    ends = {id(module.weight) for module in (merged.get_input_embeddings(), merged.get_output_embeddings())}
    matrices = {key for key, weight in merged.named_parameters() if weight.ndim >= 2 and id(weight) not in ends}
    adapted, _, frozen = message.removeprefix("LoRA of rank 4 on ").partition("; no adapter on ")
    unreached = numbers(without_gradient(model))
    assert all(name.startswith(WITHOUT_GRADIENT) for name in unreached)
    assert numbers(adapted) == numbers(count_names(changed)) + unreached
    assert numbers(frozen) == numbers(count_names(matrices - changed)) - unreached
    assert changed <= matrices
    if name in EXPECTED:
        assert (adapted.partition(":")[0], frozen) == EXPECTED[name]


def numbers(names: str) -> Counter[str]:
    return Counter({name: int(number) for name, number in re.findall(r"([\w.]+) \(([\d]+)\)", names)})


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("mixtral", "[down_proj]", "experts.down_proj (2)"),  # exists only in experts
        ("mixtral", "[gate_up_proj, q_proj]", "experts.gate_up_proj (2), self_attn.q_proj (2)"),
        ("qwen3_moe", "[down_proj]", "experts.down_proj (1), mlp.down_proj (1)"),
        ("qwen3_moe", "[gate_proj]", "mlp.gate_proj (1)"),
        ("deepseek_v3", "[experts.down_proj]", "experts.down_proj (1)"),
        ("deepseek_v3", "[shared_experts.down_proj]", "shared_experts.down_proj (1)"),
        ("jetmoe", "[mlp.input_linear]", "mlp.input_linear (2)"),
    ],
)
def test_a_list_can_name_experts(name: str, targets: str, expected: str) -> None:
    message = add_adapters(tiny_model(name), edit_lora(lora_target_modules=targets))
    assert message.partition(":")[0] == f"LoRA of rank 4 on {expected}"


@pytest.mark.parametrize(
    ("name", "target"), [("mixtral", "w1"), ("olmoe", "gate_proj"), ("mixtral", "gate"), ("phimoe", "router")]
)
def test_an_expert_by_an_old_name_and_a_router_are_errors_that_list_the_names(name: str, target: str) -> None:
    with pytest.raises(UserError) as error:
        add_adapters(tiny_model(name), edit_lora(lora_target_modules=f"[{target}]"))
    assert str(error.value) == (
        f"lora_target_modules: found '{target}'; must be all-linear, or a list of this model's linear layers and fused "
        "experts: down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj"
    )


def test_with_dropout_experts_are_frozen_or_an_error_if_they_are_named() -> None:
    message = add_adapters(tiny_model("mixtral"), edit_lora(lora_dropout="0.1"))
    assert message.startswith(f"LoRA of rank 4 on {DENSE}: ")
    assert message.endswith(f"; no adapter on {FUSED}, mlp.gate (2) (experts can have one if lora_dropout is 0)")
    with pytest.raises(UserError) as error:
        add_adapters(tiny_model("mixtral"), edit_lora(lora_dropout="0.1", lora_target_modules="[q_proj, down_proj]"))
    assert str(error.value) == (
        "lora_dropout: found 0.1; must be 0 with adapters on down_proj, for which peft has no dropout, "
        "or leave it out of lora_target_modules"
    )


def test_qlora_of_a_mixture_is_an_error_before_the_model_is_loaded() -> None:
    tiny_model("mixtral").config.save_pretrained(BASE)
    with pytest.raises(UserError) as error:
        load_for_training(edit_lora("qlora"), ONE_PROCESS)
    assert str(error.value) == (
        "finetuning: found 'qlora'; must be lora for this model, because bitsandbytes can't quantize its experts, "
        "which are fused into one parameter per layer"
    )


@pytest.mark.usefixtures("training_inputs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mixture_is_trained_and_resumes_to_the_same_bytes(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("deepseek_v3").save_pretrained(BASE)
    edit_lora(precision=precision, num_epochs="2")
    log = assert_resumes_to_the_same_bytes(capsys, 8, 5)
    assert "experts.gate_up_proj (1)" in log
    assert "unchanged by training" not in log
    losses = [loss for _, loss in curve("loss")]
    assert losses[-1] < losses[0] - 0.3
    tuned = AutoModelForCausalLM.from_pretrained(TUNED)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(TUNED / "adapter"))
    torch.testing.assert_close(tuned(IDS).logits, loaded(IDS).logits, rtol=0, atol=1e-4)
