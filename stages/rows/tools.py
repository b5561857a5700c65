"""Tools, calls and their results in the form in which `apply_chat_template` of transformers takes them."""

import json
import reprlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from stages.data.examples import BadRowError, Message
from stages.rows.strict_json import parse_json

TOOLS_ALLOWED = "must be a list of tools with a 'name', or such a list as JSON text"
# The names of the arguments in the formats of OpenAI, xLAM, LangChain and Anthropic.
ARGUMENTS = ("arguments", "parameters", "args", "input")
CALL_KEYS = {"id", "type", "index", "function", "name", *ARGUMENTS}
MAX_DEPTH = 100  # of lists and objects, which are read by recursion
CALLS_ALLOWED = "must be a call with 'name' and 'arguments', an object or its JSON text, or a list of calls"


def parse_tools(where: str, tools: Any) -> list[dict[str, Any]]:
    """Descriptions of tools, from those of OpenAI (`{"type": "function", "function": ...}`) or their inner objects.

    Raises:
        BadRowError: this is not a list of tools.
    """
    functions = [_function(parse_json(where, tool)) for tool in _as_list(parse_json(where, tools))]
    if not all(isinstance(function.get("name"), str) for function in functions):
        raise BadRowError("bad_tools", f"{where} is {reprlib.repr(tools)}; {TOOLS_ALLOWED}")
    return [{"type": "function", "function": _without_nulls(require_json(where, function))} for function in functions]


def parse_tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls, from those of OpenAI or from objects with `name` and `arguments`. The arguments become an object.

    Raises:
        BadRowError: these are not calls.
    """
    parsed = []
    for call in [parse_json(where, call) for call in _as_list(parse_json(where, calls))]:
        function = _function(call)
        given = [parse_json(where, function[name]) for name in ARGUMENTS if name in function]
        arguments = given[0] if given and given[0] not in (None, "") else {}
        is_call = isinstance(function.get("name"), str) and isinstance(arguments, dict) and len(given) <= 1
        if not is_call or not {*_present(call), *function} <= CALL_KEYS:
            raise BadRowError("bad_tool_call", f"{where} is {reprlib.repr(call)}; {CALLS_ALLOWED}")
        number = {"id": call["id"]} if call.get("id") is not None else {}
        content = {"name": function["name"], "arguments": arguments}
        parsed.append(require_json(where, {**number, "type": "function", "function": content}, "bad_tool_call"))
    if not parsed:
        raise BadRowError("bad_tool_call", f"{where} is {reprlib.repr(calls)}; {CALLS_ALLOWED}")
    return parsed


def drop_null_arguments(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> int:
    """Remove null members of the arguments of calls, unless the description of the tool allows null.

    In Arrow, all objects of a list have the same keys, so these can be arguments of the other tools.

    Returns:
        The number of calls that had such members.
    """
    parameters = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    num_changed = 0
    for function in [call["function"] for message in messages for call in message.get("tool_calls", ())]:
        kept = _given(function["arguments"], parameters.get(function["name"]))
        num_changed += kept != function["arguments"]
        function["arguments"] = kept
    return num_changed


def check_tool_results(messages: Sequence[Message]) -> None:
    """Check that each tool message follows the call that it is the result of.

    Raises:
        BadRowError: there is no such call.
    """
    calls: list[dict[str, Any]] = []  # those that may have a result at this point
    for number, message in enumerate(messages, 1):
        if message["role"] != "tool":
            calls = message.get("tool_calls", [])
            continue
        expected = message.get("tool_call_id")
        if not calls or (expected is not None and expected not in [call.get("id", expected) for call in calls]):
            which = f" of {expected!r}" if expected is not None else ""
            detail = (
                f"message {number} is the result{which} of a tool, but no assistant message before it has that call"
            )
            raise BadRowError("result_without_call", detail)


def order_results(messages: Sequence[Message]) -> list[Message]:
    """The messages, with the results of parallel calls in the order of the calls; many templates do not render ids."""
    ordered: list[Message] = []
    for is_result, group in groupby(messages, lambda message: message["role"] == "tool"):
        results = list(group)
        if is_result:
            ids = [call.get("id") for call in ordered[-1]["tool_calls"]]
            if all(result.get("tool_call_id") in ids for result in results):
                results.sort(key=lambda result: ids.index(result.get("tool_call_id")))
        ordered += results
    return ordered


def require_json(where: str, value: dict[str, Any], reason: str = "bad_tools") -> dict[str, Any]:
    """Returns the value; raises BadRowError with this reason if JSON can't express it, or it is nested too deeply."""
    if _is_deeper(value, MAX_DEPTH):
        raise BadRowError(reason, f"{where} is nested more than {MAX_DEPTH} levels deep")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRowError("not_unicode", f"{where} has a lone surrogate") from None
    except (TypeError, ValueError, RecursionError) as error:  # such as a date in Parquet
        raise BadRowError(reason, f"{where} can't be written as JSON: {error}") from None
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(part, levels - 1) for part in parts)


def _function(value: Any) -> dict[str, Any]:
    """The inner object of a tool or a call, or an empty one if there is none."""
    outer = _present(value)
    return _present(outer.get("function", outer))


def _present(value: Any) -> dict[str, Any]:
    """An object without its null members; an empty one if this is not an object."""
    return {name: part for name, part in value.items() if part is not None} if isinstance(value, dict) else {}


def _without_nulls(value: Any) -> Any:
    """The description of a tool without null members, which Arrow adds; a `default` may be null if the type is."""
    if isinstance(value, dict):
        return {
            name: _without_nulls(part)
            for name, part in value.items()
            if part is not None or (name == "default" and _allows_null(value))
        }
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _given(value: Any, schema: Any) -> Any:
    """An argument without the null members that its JSON schema does not allow."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        properties = schema["properties"] if isinstance(schema.get("properties"), dict) else {}
        return {
            name: _given(part, properties.get(name))
            for name, part in value.items()
            if part is not None or _allows_null(properties.get(name))
        }
    return [_given(part, schema.get("items")) for part in value] if isinstance(value, list) else value


def _allows_null(schema: Any) -> bool:
    """Whether a JSON schema says that a value can be null."""
    if not isinstance(schema, dict):
        return False
    types, values, *either = (_as_list(schema.get(name)) for name in ("type", "enum", "anyOf", "oneOf"))
    return (
        "null" in types
        or None in values
        or schema.get("nullable") is True
        or any(_allows_null(part) for parts in either for part in parts)
    )


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value in ("", None) else [value]
