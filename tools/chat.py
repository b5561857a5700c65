"""Chat with the tuned model in the terminal, and with the base model to compare. `make chat` runs it.

With a chat template, each question follows the history of the conversation. With `template: alpaca` each stands alone,
as in training.
"""

import re
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from stages.data.examples import Message
from stages.data.tokenizer import load_tokenizer
from stages.runtime.errors import UserError
from stages.runtime.params import GenerateParams, load_params
from stages.runtime.run import run
from stages.templates.selection import Template, load_template
from stages.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = (
    "/base and /tuned select the model and repeat the last question; /new clears the history; "
    "/quit or Ctrl-D exits, Ctrl-C stops an answer"
)


def main() -> None:
    params = load_params(GenerateParams)
    from stages.engine.models import load_model

    with suppress(ImportError):
        import readline  # noqa: F401 (`input` gets line editing and a history)

    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 must not end the conversation
    tokenizer = load_tokenizer()
    template = load_template(params.template, tokenizer, params.template_options)
    models = {"tuned": load_model(Path("models/tuned"), precision=params.precision).eval()}
    print(f"{HELP}. At most {params.max_new_tokens} tokens, temperature {params.temperature:g}: params.yaml.")
    name, question, reply = "tuned", "", ""
    history: list[Message] = []  # before the last question
    with suppress(EOFError):
        while (line := input(f"{name}> ").strip()) != "/quit":
            if line in ("/base", "/tuned"):
                name = line[1:]
                if name not in models:
                    models[name] = load_model(Path("models") / name, precision=params.precision).eval()
            elif line == "/new":
                history, question, reply = [], "", ""
            elif line.startswith("/"):
                print(HELP)
                continue
            elif not is_unicode(line):
                print("this line is not valid UTF-8 and was ignored; enter it again")
                continue
            else:
                if reply:
                    history += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
                question, reply = line, ""
            if question:
                try:
                    reply = answer(models[name], tokenizer, template, question, history, params)
                except KeyboardInterrupt:
                    print()
                except UserError as error:
                    print(error)


def is_unicode(line: str) -> bool:
    """Whether a line was UTF-8; `surrogateescape` decodes other bytes to surrogates."""
    return not re.search("[\ud800-\udfff]", line)


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    question: str,
    history: list[Message],
    params: GenerateParams,
) -> str:
    """Print the answer while it is generated, and return it.

    Raises:
        UserError: the conversation is longer than the model's context, or the template can't render it.
    """
    import torch
    from transformers import TextStreamer

    from stages.engine.decoding import generation_settings, within_context
    from stages.engine.models import autocast, check_context_length

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    (prompt,) = template.encode_prompts([question], history)
    check_context_length(model, len(prompt), "the conversation (/new clears it)")
    settings = generation_settings(template.eos_token_ids, params.max_new_tokens, params.temperature, params.top_p)
    input_ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode(), autocast(params.precision, model.device):
        (output,) = model.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=within_context(settings, model, prompt),
            streamer=Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(tokenizer.decode(output[len(prompt) :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    run(main, exclusive=False)
