"""Read YAML 1.2 as DVC does, so that a stage has the parameters that DVC compares.

In it, `1e-05`, which `dvc exp run -S` writes, is a number, and `no` is text.
"""

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

__all__ = ["YAMLError", "parse_yaml"]


def parse_yaml(text: str | bytes) -> Any:
    """Parse one YAML 1.2 document.

    Raises:
        YAMLError: not valid YAML, or a key occurs twice.
        ValueError, RecursionError: a number or the nesting exceeds Python's limits.

    Example:
        >>> parse_yaml("learning_rate: 1e-05")
        {'learning_rate': 1e-05}
    """
    try:
        return YAML(typ="safe").load(text)
    except DuplicateKeyError as error:
        error.note = "keep one of them"  # instead of how to accept it
        raise
