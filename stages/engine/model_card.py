"""The model card, `models/tuned/README.md`."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from stages.data.files import file_sha256, read_json
from stages.data.tables import shards
from stages.runtime.params import TrainParams
from stages.text import code

ADAPTER = """
The adapter alone is in `adapter/`; `peft` adds it to the base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "models/tuned", subfolder="adapter")
```
"""


def model_card(params: TrainParams, metrics: dict[str, Any]) -> str:
    """Markdown with the origin, the parameters and the results of the model, and a snippet that runs it.

    The metadata name the base model and the datasets if they are on the Hub.
    """
    base = read_json(Path("models/base/source.json"))
    data = read_json(Path("data/source.json"))
    data_hash = file_sha256(*shards(Path("data/train.parquet")))
    parameter_rows = "\n".join(f"| {name} | {value} |" for name, value in params.model_dump().items())
    names = {"lora": "LoRA", "qlora": "QLoRA (4-bit base)"}
    trained = "all weights"
    if params.finetuning != "full":
        trained = f"{names[params.finetuning]} of rank {params.lora_rank}, weights merged"
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation", datasets=hub_datasets(data))
    base_arguments = '"models/base"'
    if base["revision"]:  # it is on the Hub
        metadata.base_model = base["model_name"]
        base_arguments = f"{json.dumps(base['model_name'])}, revision={json.dumps(base['revision'])}"
    text = f"""\
# {code(re.sub("#sha256=.*", "", base["model_name"]))}, fine-tuned on {code(data["source"])}

| property | value |
|---|---|
| base model | {code(base["model_name"])}, revision {code(base["revision"] or "not stated")} |
| dataset | {code(data["source"])}, revision {code(data["revision"] or "not stated")} |
| license of the dataset | {code(data["license"] or "not stated")} |
| fine-tuned | {trained} |
| training examples | {metrics["examples"]:,}; sha256 of `data/train.parquet`: `{data_hash}` |
| training loss | {metrics["loss"]:.4f} nats/token, mean of the run |
| validation loss | {metrics["validation_loss"]:.4f} nats/token, at step {metrics["best_step"]} of {metrics["steps"]} |

| parameter | value |
|---|---|
{parameter_rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "models/tuned"
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{ADAPTER.format(base=base_arguments) if params.finetuning != "full" else ""}"""
    return str(ModelCard(f"---\n{metadata}\n---\n{text}"))


def hub_datasets(data: dict[str, Any]) -> list[str] | None:
    """The ids of datasets that are from the Hub, of which `data/source.json` has the commit; None if there are none."""
    names, revisions = (str(data[key]).split(", ") for key in ("source", "revision"))
    if len(names) != len(revisions):  # the name of a file has a comma
        return None
    return [name for name, commit in zip(names, revisions, strict=True) if re.fullmatch("[0-9a-f]{40}", commit)] or None
