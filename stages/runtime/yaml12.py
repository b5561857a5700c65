"""Read YAML 1.2, as DVC does. In it, `1e-05`, which `dvc exp run -S` writes, is a number, and `no` is text."""

import re
from typing import Any

import yaml
from yaml import YAMLError

__all__ = ["YAMLError", "parse_yaml"]

# The core schema of YAML 1.2.2, section 10.3.2: tag, pattern, first characters.
CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class Yaml12Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the types of YAML 1.2; a key that occurs twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's attribute; empty, to drop YAML 1.1)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"found key {key.value!r} twice; keep one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for name, (pattern, first) in CORE_SCHEMA.items():  # in this order: an integer also matches the pattern of a float
    Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), first)
Yaml12Loader.add_constructor("tag:yaml.org,2002:int", Yaml12Loader.construct_integer)


def parse_yaml(text: str | bytes) -> Any:
    """Parse one YAML 1.2 document.

    Raises:
        YAMLError: not valid YAML, or a key occurs twice.
        ValueError, RecursionError: a number or the nesting exceeds Python's limits.

    Example:
        >>> parse_yaml("learning_rate: 1e-05")
        {'learning_rate': 1e-05}
    """
    return yaml.load(text, Yaml12Loader)  # noqa: S506 (a subclass of the safe loader)
