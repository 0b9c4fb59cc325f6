"""Dumps that hold text and nothing else: chats, ShareGPT conversations, prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import Exchange, Refused, mapping, sequence, text, turns
from drafttrain.data_gen.turns import CALLS, FLAGS, ROLES

SYSTEM = ("system", "system_prompt")


def is_dump(value: Mapping[str, Any]) -> bool:
    """Return whether a line is of such a dump."""
    return "conversations" in value or "messages" in value or _is_completion(value)


def exchanges(value: dict[str, Any], *, id: str) -> list[Exchange]:
    """Return an exchange for each answer of the assistant; its prompt is all turns before it.

    Raises:
        Refused: A part has the wrong type, or there is no answer.
    """
    id = str(value.get("id") or id)
    about: dict[str, Any] = {
        name: value[name] for name in ("model", "domain", "user") if isinstance(value.get(name), str)
    }
    if _is_completion(value):
        prompt, incomplete = _prompt(value["prompt"])
        return [
            Exchange(id, prompt, text(value["completion"], "completion"), finish="stop", incomplete=incomplete, **about)
        ]
    chat, incomplete = _turns(value)
    given: list[dict[str, Any]] = value["messages"] if "messages" in value else value["conversations"]
    trained = [all(turn.get(flag) not in (0, False) for flag in FLAGS) for turn in given]
    arguments = mapping(value.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    about["template_arguments"] = {k: v for k, v in arguments.items() if isinstance(v, bool | int | float | str)}
    if value.get("tools") or value.get("functions"):
        incomplete = "tool_calls"
    system = [{"role": "system", "content": text(value[key], key)} for key in SYSTEM if value.get(key)]
    if system and chat[0]["role"] != "system":
        chat = [system[0], *chat]
        trained = [False, *trained]
    elif system and system[0] != chat[0]:
        incomplete = incomplete or "two_systems"
    found = [
        Exchange(f"{id}@{i}", chat[:i], turn["content"], finish="stop", incomplete=incomplete, **about)
        for i, turn in enumerate(chat)
        if turn["role"] == "assistant" and i > 0 and trained[i]
    ]
    if not found:
        raise Refused("empty", "has no answer of the assistant")
    return found


def _is_completion(value: Mapping[str, Any]) -> bool:
    return "prompt" in value and "completion" in value


def _prompt(value: Any) -> tuple[str | list[dict[str, str]], str]:
    return turns(value, "prompt") if isinstance(value, list) else (text(value, "prompt"), "")


def _turns(value: dict[str, Any]) -> tuple[list[dict[str, str]], str]:
    if "messages" in value:
        return turns(value["messages"], "messages")
    chat, incomplete = [], ""
    for number, turn in enumerate(sequence(value["conversations"], "conversations")):
        here = mapping(turn, f"conversations.{number}")
        role = here.get("from", here.get("role"))
        word = role.lower() if isinstance(role, str) else str(role)
        if word not in ROLES:
            incomplete = incomplete or "unknown_role"
        if word in CALLS or here.get("tool_calls"):
            incomplete = incomplete or "tool_calls"
        words = text(here.get("value", here.get("content")), f"conversations.{number}.value")
        chat.append({"role": ROLES.get(word, word), "content": words})
    return chat, incomplete
