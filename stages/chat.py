"""Talk to the tuned model at the terminal, and to the base model to compare. `make chat` runs it.

With a chat template a question follows what was said before. In Alpaca's form each stands alone, as the examples do on
which the model was trained.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.shared.errors import UserError
from stages.shared.examples import Message
from stages.shared.masking import load_tokenizer
from stages.shared.params import GenerateParams, load_params
from stages.shared.run import run
from stages.shared.templates import Template, load_template
from stages.shared.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = (
    "/base and /tuned switch the model and ask the last question again; /new forgets what was said; "
    "/quit or Ctrl-D ends, Ctrl-C cuts an answer"
)


def main() -> None:
    params = load_params(GenerateParams)
    from stages.shared.models import load_model

    with suppress(ImportError):
        import readline  # noqa: F401 (`input` gets line editing and a history)

    tokenizer = load_tokenizer()
    template = load_template(params.template, tokenizer)
    models = {"tuned": load_model(Path("models/tuned")).eval()}
    print(f"{HELP}. At most {params.max_new_tokens} tokens, temperature {params.temperature:g}: params.yaml.")
    name, question, reply = "tuned", "", ""
    earlier: list[Message] = []  # turns before the last question
    with suppress(EOFError):
        while (line := input(f"{name}> ").strip()) != "/quit":
            if line in ("/base", "/tuned"):
                name = line[1:]
                if name not in models:
                    models[name] = load_model(Path("models") / name).eval()
            elif line == "/new":
                earlier, question, reply = [], "", ""
            elif line.startswith("/"):
                print(HELP)
                continue
            else:
                if reply:
                    earlier += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
                question, reply = line, ""
            if question:
                try:
                    reply = answer(models[name], tokenizer, template, question, earlier, params)
                except KeyboardInterrupt:
                    print()
                except UserError as error:
                    print(error)


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    question: str,
    earlier: list[Message],
    params: GenerateParams,
) -> str:
    """Print the answer as it comes, and return it.

    Raises:
        UserError: the talk is longer than the model's context, or the template can't render it.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    from stages.shared.models import autocast, require_context

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    (prompt,) = template.encode_prompts([question], earlier)
    require_context(model, len(prompt), "the question")
    sampling: dict[str, Any] = {"do_sample": False}
    if params.temperature:
        sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        eos_token_id=template.end_token_id,
        pad_token_id=template.end_token_id,
        **sampling,
    )
    input_ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode(), autocast(params.precision, model.device):
        (output,) = model.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=settings,
            streamer=Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(tokenizer.decode(output[len(prompt) :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    run(main, alone=False)
