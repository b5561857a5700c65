"""Answer `sample_prompts` with one model → `metrics/samples/<model>.md`.

The file is tracked in git, so that a pull request shows how the answers changed.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.data.files import write_text
from stages.data.tokenizer import load_tokenizer
from stages.runtime.params import GenerateParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary
from stages.templates.selection import load_template
from stages.text import block, heading

if TYPE_CHECKING:
    from stages.engine.decoding import Answer
    from stages.engine.distributed import DistributedContext


def main() -> None:
    params = load_params(GenerateParams)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["base", "tuned"])
    name = parser.parse_args().model

    from stages.engine.distributed import run_inference

    answers = run_inference(params.launcher, partial(answer_prompts, Path("models") / name, params))
    if answers is None:
        return
    shown = f"temperature {params.temperature:g}, top_p {params.top_p:g}, seed {params.seed}"
    parts = [f"# Answers of the {name} model\n\nAt most {params.max_new_tokens} tokens, {shown}.\n"]
    for instruction, answer in zip(params.sample_prompts, answers, strict=True):
        end = "" if answer.stopped else f"\n*(cut at {answer.num_tokens} tokens)*\n"
        thought = ""
        if answer.parts.reasoning is not None:
            state = "never ends, so there is no answer" if answer.parts.is_open else "is not shown"
            thought = f"*(the reasoning, {len(answer.parts.reasoning):,} characters, {state})*\n\n"
        parts.append(f"## {heading(instruction)}\n\n{thought}{block(answer.parts.text)}\n{end}")
    path = Path(f"metrics/samples/{name}.md")
    write_text(path, "\n".join(parts))
    stopped = sum(answer.stopped for answer in answers)
    summary(
        {"model": name, "answers": f"{len(answers):,}, of which {stopped:,} ended with EOS; {shown}"},
        wrote=[path],
        then="make chat",
    )


def answer_prompts(folder: Path, params: GenerateParams, context: "DistributedContext") -> "list[Answer]":
    """The answers of a model to `sample_prompts`."""
    from transformers import set_seed

    from stages.engine.decoding import choose_method, generate_answers, generation_settings
    from stages.engine.loading import load_for_inference
    from stages.engine.models import autocast, check_context_length

    model, tokenizer = load_for_inference(folder, params.precision, context), load_tokenizer()
    template = load_template(params.template, tokenizer, params.template_options, params.reasoning_end)
    prompts = template.encode_prompts(params.sample_prompts)
    check_context_length(model, max(map(len, prompts)), "the longest of sample_prompts")
    set_seed(params.seed)
    settings = generation_settings(template.eos_token_ids, params.max_new_tokens, params.temperature, params.top_p)
    with autocast(params.precision, model.device, cache_enabled=not context.sharded):
        method = choose_method(model, prompts, params.max_new_tokens)
        max_tokens = params.batch_size * params.max_length
        return generate_answers(model, template.answer_parser, prompts, settings, max_tokens, method)


if __name__ == "__main__":
    run(main)
