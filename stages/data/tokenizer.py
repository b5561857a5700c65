"""Load the saved tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from stages.data.files import read_json
from stages.runtime.errors import user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Beside the tokenizer: the ids of the tokens at which the model stops, if there are others than the EOS token.
STOP_IDS = "stop_ids.json"
# What `format` found out about the template, for `train`, which then depends on no code of templates: the chat template
# that is saved with the model, and the tokens that end an answer.
PROMPT_FORMAT = Path("data/prompt_format.json")


def load_stop_ids(folder: Path = Path("models/tokenizer")) -> list[int]:
    """The tokens at which the model stops, besides the EOS token of the tokenizer."""
    path = folder / STOP_IDS
    return list(read_json(path)) if path.exists() else []


def load_tokenizer(folder: Path = Path("models/tokenizer")) -> "PreTrainedTokenizerBase":
    """Load a saved tokenizer, without access to the network."""
    from transformers import TokenizersBackend

    tokenizer: PreTrainedTokenizerBase
    with user_errors(folder):
        if read_json(folder / "tokenizer_config.json").get("tokenizer_class") == "TokenizersBackend":
            tokenizer = TokenizersBackend.from_pretrained(folder, local_files_only=True)
        else:
            from transformers import AutoTokenizer  # this imports torch, which takes a second

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer
