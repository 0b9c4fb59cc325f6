"""Dumps that hold what was said and nothing else: chats, ShareGPT conversations, prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused, mapping, sequence, text, turns
from drafttrain.data_gen.turns import CALLS, FLAGS, ROLES

SYSTEM = ("system", "system_prompt")


def is_dump(value: Mapping[str, Any]) -> bool:
    """Tell whether a line is of such a dump."""
    return "conversations" in value or "messages" in value or _is_completion(value)


def exchanges(value: dict[str, Any], *, id: str) -> list[Exchange]:
    """Return an exchange for each answer of the assistant: what it read is what was said before.

    Raises:
        Refused: A part is of the wrong type, or nobody answers.
    """
    id = str(value.get("id") or id)
    about: dict[str, Any] = {
        name: value[name] for name in ("model", "domain", "user") if isinstance(value.get(name), str)
    }
    if _is_completion(value):
        prompt, untold = _prompt(value["prompt"])
        return [Exchange(id, prompt, text(value["completion"], "completion"), finish="stop", untold=untold, **about)]
    said, untold = _turns(value)
    given: list[dict[str, Any]] = value["messages"] if "messages" in value else value["conversations"]
    trained = [all(turn.get(flag) not in (0, False) for flag in FLAGS) for turn in given]
    arguments = mapping(value.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    about["template_arguments"] = {k: v for k, v in arguments.items() if isinstance(v, bool | int | float | str)}
    if value.get("tools") or value.get("functions"):
        untold = "tool_calls"
    system = [{"role": "system", "content": text(value[key], key)} for key in SYSTEM if value.get(key)]
    if system and said[0]["role"] != "system":
        said = [system[0], *said]
        trained = [False, *trained]
    elif system and system[0] != said[0]:
        untold = untold or "two_systems"
    found = [
        Exchange(f"{id}@{i}", said[:i], turn["content"], finish="stop", untold=untold, **about)
        for i, turn in enumerate(said)
        if turn["role"] == "assistant" and i > 0 and trained[i]
    ]
    if not found:
        raise Refused("empty", "no answer of the assistant is here")
    return found


def _is_completion(value: Mapping[str, Any]) -> bool:
    return "prompt" in value and "completion" in value


def _prompt(value: Any) -> tuple[str | list[dict[str, str]], str]:
    return turns(value, "prompt") if isinstance(value, list) else (text(value, "prompt"), "")


def _turns(value: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
    if "messages" in value:
        return turns(value["messages"], "messages")
    said, untold = [], ""
    for number, turn in enumerate(sequence(value["conversations"], "conversations")):
        here = mapping(turn, f"conversations.{number}")
        role = here.get("from", here.get("role"))
        word = role.lower() if isinstance(role, str) else str(role)
        if word not in ROLES:
            untold = untold or "unknown_role"
        if word in CALLS or here.get("tool_calls"):
            untold = untold or "tool_calls"
        words = text(here.get("value", here.get("content")), f"conversations.{number}.value")
        said.append({"role": ROLES.get(word, word), "content": words})
    return said, untold
