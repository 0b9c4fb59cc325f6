"""Merges the chunks of a streamed answer into the response that the server would have sent without streaming."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import mapping, sequence


def merged(chunks: Iterable[Any]) -> dict[str, Any]:
    """Return one response: texts, token ids and log-probabilities of all chunks joined, by choice."""
    whole: dict[str, Any] = {}
    choices: dict[Any, dict[str, Any]] = {}
    for number, chunk in enumerate(chunks):
        part = mapping(chunk, f"chunks.{number}")
        whole |= {key: value for key, value in part.items() if key not in ("choices", "object") and value is not None}
        for choice in sequence(part.get("choices") or [], f"chunks.{number}.choices"):
            here = mapping(choice, f"chunks.{number}.choices")
            index = here.get("index") if isinstance(here.get("index"), int) else 0
            _add(choices.setdefault(index, {"index": index}), here)
    for choice in choices.values():
        _join(choice, "text")
        message = choice.get("message", {})
        for name in ("content", "reasoning_content", "reasoning"):
            _join(message, name)
    return whole | {"choices": [choices[index] for index in sorted(choices)]}


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a chunk's part of a choice; pieces of text stay a list until the last chunk."""
    for name in ("finish_reason", "stop_reason", "prompt_token_ids", "matched_stop"):
        if part.get(name) is not None:
            choice[name] = part[name]
    if isinstance(part.get("text"), str):
        choice.setdefault("text", []).append(part["text"])
    if part.get("token_ids") is not None:
        choice.setdefault("token_ids", []).extend(sequence(part["token_ids"], "token_ids"))
    if part.get("speculative") is not None:
        rounds = choice.setdefault("speculative", {})
        for name, values in mapping(part["speculative"], "speculative").items():
            rounds.setdefault(name, []).extend(sequence(values, f"speculative.{name}"))
    if part.get("logprobs") is not None:
        logged = choice.setdefault("logprobs", {})
        for name, values in mapping(part["logprobs"], "logprobs").items():
            if values is not None:
                logged.setdefault(name, []).extend(sequence(values, f"logprobs.{name}"))
    if part.get("delta") is not None:
        message = choice.setdefault("message", {"role": "assistant"})
        for name, value in mapping(part["delta"], "delta").items():
            if name in ("content", "reasoning_content", "reasoning"):
                if isinstance(value, str):
                    message.setdefault(name, []).append(value)
            elif name == "tool_calls" and value:
                # That a tool was called matters, not which: the text is not all of the answer then.
                message["tool_calls"] = [{}]


def _join(values: dict[str, Any], name: str) -> None:
    if isinstance(values.get(name), list):
        values[name] = "".join(values[name])
