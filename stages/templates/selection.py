"""Choose a template. Training, evaluation and generation take their prompts from it.

With every template, the token ids before a response are the same in training and at inference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.data.files import write_text
from stages.data.tokenizer import load_stop_ids
from stages.runtime.errors import UserError, user_errors
from stages.templates.alpaca import AlpacaTemplate
from stages.templates.chat_template import ChatTemplate
from stages.templates.plain_text import PlainText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A copy of the Jinja file that `template` names; for alpaca and chat, only a comment. Later stages depend on this file
# and not on the folder `templates`, so that editing another template does not train again.
SELECTED_TEMPLATE = Path("data/template.jinja")
Template = AlpacaTemplate | ChatTemplate


def select_template(name: str) -> None:
    """Write `SELECTED_TEMPLATE`, from which `load_template` reads.

    Args:
        name: the parameter `template`: alpaca, chat (the template of the tokenizer), chat:NAME (if it has several) or a
            Jinja file.

    Raises:
        UserError: there is no such file, or it is not text.
    """
    text = f"{{# {name} #}}\n"  # not empty, which DVC would warn about
    if name != "alpaca" and not is_chat(name):
        if not Path(name).is_file():
            raise UserError(f"template: {name!r} is not a file; if it is new, `git add` it before `dvc exp run --temp`")
        with user_errors(Path(name), "save it as UTF-8 text"):
            text = Path(name).read_text(encoding="utf-8")
    write_text(SELECTED_TEMPLATE, text)


def load_template(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, Any] | None = None,
    reasoning_end: str | None = None,
) -> Template:
    """Load the template that `select_template` has selected.

    Args:
        options, reasoning_end: the parameters `template_options` and `reasoning_end`; the latter has no effect on
            prompts.

    Raises:
        UserError: the tokenizer has no chat template, the Jinja file is not a chat template, or it does not use an
            option.
    """
    if name == "alpaca":
        if options:
            raise UserError(
                f"template_options: found {dict(options)}, but template alpaca has no options; must be null"
            )
        return AlpacaTemplate(tokenizer)
    stop_ids = load_stop_ids()
    if is_chat(name):
        text, where = _own_template(name, tokenizer), "the tokenizer's chat template"
        return ChatTemplate(
            tokenizer, text, where, options, stop_ids, reasoning_end, getattr(tokenizer, "response_template", None)
        )
    with user_errors(SELECTED_TEMPLATE):
        text = SELECTED_TEMPLATE.read_text(encoding="utf-8")
        if "adds_bos" in text:  # the tokenizer knows it, but Jinja does not
            text = f"{{% set adds_bos = {str(bool(PlainText(tokenizer).bos)).lower()} %}}{text}"
        return ChatTemplate(tokenizer, text, name, options, stop_ids, reasoning_end)


def is_chat(name: str) -> bool:
    """Whether `template` names a chat template of the tokenizer."""
    return name == "chat" or name.startswith("chat:")


def _own_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's chat template with this name; a tokenizer can have several."""
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    selected = name.partition(":")[2] or "default"
    if selected in templates:
        return str(templates[selected])
    names = "".join(f"chat:{other}, " for other in sorted(templates))
    problem = "does not have it" if names else "has no chat template"
    raise UserError(
        f"template: found {name}, but the tokenizer of this model {problem}; "
        f"set template to {names}alpaca or to a file in templates/"
    )
