"""From the turns of a chat, in the forms of data sets, to the turns that a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.record_keys import Reading, is_metadata, unknown

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Words for a role, in lower case, and the role that templates know. A recipe can add words (`roles`)."""
CALLS = ("function_call", "tool_call")
"""Words for a turn whose content is a call, as JSON."""
REASONING = ("reasoning_content", "reasoning", "thinking")
PASSED = ("name", "tool_call_id", *REASONING)
"""Keys of a turn that are passed to the template unchanged; calls are passed in one form."""
FLAGS = ("weight", "loss", "train")
"""Keys of a turn that say whether it is trained."""
KNOWN = {"role", "from", "content", "value", "tool_calls", "function_call", *PASSED, *FLAGS}
TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(turns: Any, key: str, reading: Reading) -> list[tuple[dict[str, Any], bool]]:
    """Return each turn as input of a template, and whether it is a trained answer.

    Args:
        turns: A list of turns; JSON text of one; or a mapping of keys to lists of equal length, as tables store turns.

    Raises:
        BadItem: A turn has an unknown role or key, or no text.
    """
    turns = json_of(turns, key)
    if isinstance(turns, Mapping):
        turns = _by_turn(turns, key)
    if not isinstance(turns, list) or not turns:
        raise BadItem(f"{key}: must be a list of turns")
    return [_turn(turn, f"{key}.{number}", reading) for number, turn in enumerate(turns)]


def user(content: Any, key: str) -> tuple[dict[str, Any], bool]:
    """Return a user's turn."""
    return {"role": "user", "content": text_of(content, key)}, False


def assistant(content: Any, key: str) -> tuple[dict[str, Any], bool]:
    """Return a trained answer."""
    return {"role": "assistant", "content": text_of(content, key)}, True


def _by_turn(columns: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    if any(not isinstance(column, list) for column in columns.values()) or len({*map(len, columns.values())}) != 1:
        raise BadItem(f"{key}: a mapping must hold lists of equal length, one value a turn")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _turn(turn: Any, key: str, reading: Reading) -> tuple[dict[str, Any], bool]:
    if not isinstance(turn, Mapping):
        raise BadItem(f"{key}: must be a mapping with role and content")
    given = reading.without_ignored(turn)
    for name, part in given.items():
        if name not in KNOWN and not is_metadata(name) and part not in ("", [], {}):
            raise BadItem(unknown(name, key))
    word = _either(given, ("role", "from"), key)
    role, is_call = role_of(word, reading, key)
    calls = _calls(given, key)
    content = _either(given, ("content", "value"), key)
    if is_call:
        calls, content = [*calls, *_spelled_calls(content, f"{key}.content")], None
    if calls and role != "assistant":
        raise BadItem(f"{key}.tool_calls: the role {word!r} cannot call tools")
    found: dict[str, Any] = {"role": role}
    found |= {name: text_of(given[name], f"{key}.{name}") for name in PASSED if given.get(name) not in (None, "")}
    # An answer may hold only a call or thoughts; a tool result and a system prompt may be empty.
    may_be_empty = bool(calls) or any(name in found for name in REASONING) or role in ("system", "tool")
    found["content"] = "" if may_be_empty and content in (None, "", []) else content_of(content, f"{key}.content")
    if calls:
        found["tool_calls"] = calls
    return found, role == "assistant" and all(_flag(given[name], f"{key}.{name}") for name in FLAGS if name in given)


def role_of(word: Any, reading: Reading, key: str) -> tuple[str, bool]:
    """Return the templates' role for a word, and whether its turn is a call.

    Raises:
        BadItem: The word is unknown.
    """
    known = None
    if isinstance(word, str):
        meant = reading.roles.get(word, word.lower())
        known = ROLES.get(meant)
        if known is not None:
            return known, meant in CALLS
    raise BadItem(
        f"{key}: unknown role {word!r}. Known: {', '.join([*ROLES, *reading.roles])}; add others in roles of the source"
    )


def text_of(value: Any, key: str) -> str:
    """Return text that is not empty.

    Raises:
        BadItem: It is anything else.
    """
    if not isinstance(value, str) or not value:
        raise BadItem(
            f"{key}: must be text, got {type(value).__name__ if not isinstance(value, str) else 'an empty one'}"
        )
    return unicode_text(value, key)


def content_of(value: Any, key: str) -> str:
    """Return the text of a turn; parts of text are joined by line ends, as servers do.

    Raises:
        BadItem: It is empty, not text, or holds a picture.
    """
    if isinstance(value, list) and value:
        value = "\n".join(_part(part, f"{key}.{number}") for number, part in enumerate(value))
    return text_of(value, key)


def unicode_text(text: str, key: str) -> str:
    """Return text unchanged; refuse half a surrogate pair, which JSON can hold and Unicode text cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadItem(f"{key}: not Unicode text: half a surrogate pair at character {error.start}") from error
    return text


def json_of(value: Any, key: str) -> Any:
    """Return the value of JSON text; anything but text unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadItem(f"{key}: not JSON: {error}") from error


def _part(part: Any, key: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind not in TEXT_PARTS:
        raise BadItem(f"{key}: has type {kind!r}; only parts of text are read")
    words = part.get("text")
    if not isinstance(words, str):
        raise BadItem(f"{key}.text: must be text, got {type(words).__name__}")
    return words


def _calls(given: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = json_of(given.get("tool_calls") or [], f"{key}.tool_calls")
    if one := given.get("function_call"):
        found = [*(found if isinstance(found, list) else []), one]
    if not isinstance(found, list):
        raise BadItem(f"{key}.tool_calls: must be a list, got {type(found).__name__}")
    return [_call(call, f"{key}.tool_calls.{number}") for number, call in enumerate(found)]


def _spelled_calls(content: Any, key: str) -> list[dict[str, Any]]:
    """Return the calls in the content of a turn of the role function_call: one, or a list."""
    found = json_of(content, key)
    return [_call(call, key) for call in (found if isinstance(found, list) and found else [found])]


def _call(call: Any, key: str) -> dict[str, Any]:
    """Return a call as templates read it: under `function`, with arguments parsed to an object where possible, as servers do."""
    call = json_of(call, key)
    about = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(about, Mapping) or not isinstance(about.get("name"), str):
        raise BadItem(f"{key}: must be a call with name and arguments")
    arguments = about.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    function = {name: part for name, part in about.items() if name not in ("id", "type")}
    if arguments is not None:
        function["arguments"] = arguments
    more = {name: call[name] for name in ("id",) if call.get(name) is not None}
    return {**more, "type": "function", "function": function}


def _flag(value: Any, key: str) -> bool:
    """Return whether a turn is trained; weights between 0 and 1 are refused, because drafters are not trained with them."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadItem(f"{key}: must be 0, 1, true or false, got {value!r}")
    return bool(value)


def _either(given: Mapping[str, Any], names: tuple[str, str], key: str) -> Any:
    """Return the value under either of two names."""
    values = [given[name] for name in names if name in given]
    if len(values) > 1 and values[0] != values[1]:
        raise BadItem(f"{key}: {names[0]} and {names[1]} differ")
    return values[0] if values else None
