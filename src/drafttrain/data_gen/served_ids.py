"""Compares the ids of chats with those of a serving engine (vLLM's /tokenize): a drafter must see what it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drafttrain.core.errors import DataError
from drafttrain.data_gen.chat import Chat
from drafttrain.data_gen.chat_template import with_text
from drafttrain.data_gen.data_check import Finding, difference, until_last_answer
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.openai_client import Completions, NotAnswered

TOKENIZE = "/tokenize"


async def served_differences(
    chats: Sequence[tuple[str, Chat]], encoder: Encoder, server: Completions, *, model: str
) -> list[Finding]:
    """Return where a server tokenizes a chat, or its prompt with the generation prompt, differently from the template here.

    Args:
        chats: Places and chats.
        model: The server's name for the target.

    Raises:
        DataError: The server does not answer, or has no such page.
    """
    found = []
    for where, chat in chats:
        whole = until_last_answer(chat)
        for part, asks in ((whole, False), (whole.until(len(whole.turns) - 1), True)):
            finding = await _compared(part, encoder, server, model=model, asks=asks)
            if finding:
                found.append(Finding("server", where, finding))
                break
    return found


async def _compared(chat: Chat, encoder: Encoder, server: Completions, *, model: str, asks: bool) -> str:
    """Return how the server's ids differ; empty: not at all."""
    try:
        answer = await server.post(TOKENIZE, _request(chat, model=model, asks=asks))
    except NotAnswered as reason:
        return f"the server refuses the chat: {reason}"
    theirs = answer.get("tokens")
    if not isinstance(theirs, list) or any(type(token) is not int for token in theirs):
        raise DataError(f"{server.base_url}: {TOKENIZE} returned no list of ids under tokens: not vLLM's")
    ours = encoder.template.ids(encoder.template.text(chat, asks=asks))
    if ours == theirs:
        return ""
    return difference(ours, theirs, encoder, of=f"the server, {'prompt' if asks else 'whole chat'}")


def _request(chat: Chat, *, model: str, asks: bool) -> dict[str, Any]:
    """Return vLLM's request: arguments of calls are JSON text there, and calls have ids."""
    return {
        "model": model,
        "messages": [_message(turn) for turn in chat.turns],
        "add_generation_prompt": asks,
        "add_special_tokens": False,
        **{name: part for name, part in chat.inputs.items() if name == "tools"},
        "chat_template_kwargs": {**{k: v for k, v in chat.inputs.items() if k != "tools"}, **chat.arguments},
    }


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    sent = with_text(dict(turn))
    if "tool_calls" in sent:
        sent["tool_calls"] = [{"id": f"call_{i}", **call} for i, call in enumerate(sent["tool_calls"])]
    return sent
