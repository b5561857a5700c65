"""The model card, `models/tuned/README.md`."""

import re
from pathlib import Path
from typing import Any

from stages.data.files import file_sha256, read_json
from stages.data.tables import shards
from stages.runtime.params import TrainParams
from stages.text import code

ADAPTER = """
The adapter alone is in `adapter/`; `peft` adds it to the base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("models/base")
model = PeftModel.from_pretrained(base, "models/tuned/adapter")
```
"""


def model_card(params: TrainParams, metrics: dict[str, Any]) -> str:
    """Markdown with the origin, the parameters and the results of the model, and a snippet that runs it."""
    base = read_json(Path("models/base/source.json"))
    data = read_json(Path("data/source.json"))
    data_hash = file_sha256(*shards(Path("data/train.parquet")))
    parameter_rows = "\n".join(f"| {name} | {value} |" for name, value in params.model_dump().items())
    names = {"lora": "LoRA", "qlora": "QLoRA (4-bit base)"}
    trained = "all weights"
    if params.finetuning != "full":
        trained = f"{names[params.finetuning]} of rank {params.lora_rank}, weights merged"
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
---
# {code(re.sub("#sha256=.*", "", base["model_name"]))}, fine-tuned on {code(data["source"])}

| property | value |
|---|---|
| base model | {code(base["model_name"])}, revision {code(base["revision"] or "not stated")} |
| dataset | {code(data["source"])}, revision {code(data["revision"] or "not stated")} |
| license of the dataset | {code(data["licence"] or "not stated")} |
| fine-tuned | {trained} |
| training examples | {metrics["examples"]:,}; sha256 of `data/train.parquet`: `{data_hash}` |
| training loss | {metrics["loss"]:.4f} nats/token, mean of the run |
| validation loss | {metrics["validation_loss"]:.4f} nats/token, at step {metrics["best_step"]} of {metrics["steps"]} |

| parameter | value |
|---|---|
{parameter_rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/tuned")
tokenizer = AutoTokenizer.from_pretrained("models/tuned")
messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{ADAPTER if params.finetuning != "full" else ""}"""
