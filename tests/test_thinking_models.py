"""Templates of models that think, through the real stages: the tuned model stops where it was trained to."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages.data.files import read_json
from tests.clone import ROOT, copy_tree, edit, make_tokenizer, run_pipeline
from tests.test_chat_templates import DEEPSEEK, FAMILIES, GLM, GPT_OSS, jinja

# The special tokens, those at which the model stops, parameters, and the end of the tuned model's answers.
MODELS: dict[str, tuple[list[str], list[str], dict[str, str], list[str]]] = {
    "nemotron_3_nano": (FAMILIES["qwen2_5"][0], ["<|im_end|>"], {}, ["<|im_end|>"]),
    "glm4moe": (GLM, ["<|endoftext|>", "<|user|>", "<|observation|>"], {}, ["<|user|>", "<|observation|>"]),
    "deepseek_r1_distill": (DEEPSEEK, DEEPSEEK[-1:], {"reasoning_end": '"\\n</think>\\n\\n"'}, DEEPSEEK[-1:]),
    "gptoss": (
        GPT_OSS,
        ["<|return|>", "<|call|>"],
        {"num_epochs": "30", "learning_rate": "5e-3", "template_options": "{reasoning_effort: low}"},
        ["<|return|>", "<|call|>"],
    ),
    "channels": (["<|end|>", "<|channel|>", "<|message|>"], ["<|end|>"], {}, ["<|end|>"]),
}
# Special tokens around the name of a channel.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A:{% if m.reasoning_content %}"
    "<|channel|>analysis<|message|>{{ m.reasoning_content }}{% endif %}<|channel|>final<|message|>{{ m.content }}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_thinks_learns_its_answers_and_stops_and_passes_checks_of_its_final_text(
    name: str, project: Path, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    special_tokens, stops, params, ends = MODELS[name]
    tokenizer = make_tokenizer(special_tokens, eos_token=stops[0])
    tokenizer.chat_template = CHANNELS if name == "channels" else jinja(name)
    shutil.copytree(tiny_model, project / "model")
    tokenizer.save_pretrained(project / "model")
    GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(stops)).save_pretrained(project / "model")
    copy_tree(ROOT / "stages", project / "stages")
    rows = [
        {"prompt": f"{n + 10}: {word}?", "completion": word, "reasoning_content": f"say {word}"}
        | {"check": {"equals": word, "max_words": 1}}
        for n in range(20)
        for word in ("trees", "boxes")
    ]
    (project / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(project, dataset_file="data/a.jsonl", template="chat", model_name="model", max_new_tokens="60")
    edit(project, learning_rate="1e-2", num_epochs="16", precision="fp32", max_length="600", test_fraction="0.3")
    edit(project, batch_size="2", gradient_accumulation_steps="1", **params)
    run_pipeline(
        project, "download_dataset", "download_model", "format", "split", "train", "predict@tuned", "evaluate@tuned"
    )

    examples = pq.read_table("data/test.parquet").to_pylist()
    answers = pq.read_table("data/answers/tuned.parquet").to_pylist()
    answers = [answer for answer in answers if answer["split"] == "test"]
    assert [answer["answers"] for answer in answers] == [[example["response"]] for example in examples]
    assert all(answer["stopped"] == [True] for answer in answers)
    assert [answer["reasoning"] for answer in answers] == [[f"say {example['response']}"] for example in examples]
    metrics = read_json(Path("metrics/evaluate/tuned.json"))
    assert [metrics[key] for key in ("pass_rate", "exact_match", "rouge_l", "open_reasoning")] == [1, 1, 1, 0]
    tuned = AutoTokenizer.from_pretrained("models/tuned")
    prompts = [
        tuned.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]  # without options, as other programs render it
    assert {example["prompt"] for example in examples} <= {*prompts}
    assert name != "gptoss" or "Current date: 2024-07-26\n\nReasoning: low\n" in prompts[0]
    ids = GenerationConfig.from_pretrained("models/tuned").eos_token_id
    assert tuned.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids]) == ends
    assert tuned.eos_token == ends[0]
