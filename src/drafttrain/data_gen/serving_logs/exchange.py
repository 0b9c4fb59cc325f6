"""One request and one answer to it, whatever log they were read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drafttrain.data_gen.bad_item import BadItem

Law = Sequence[Sequence[tuple[int | str, float]]]
"""By answered token: (token, log-probability) pairs, the token that was answered first. A token is an id, or how it is spelled."""


class Refused(BadItem):
    """Why a line of a log gives no record: a kind that is counted, and a sentence.

    What the line says is not repeated: the sentence is written to disk before anything could redact it.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(f"{kind}: {sentence}")
        self.kind = kind


@dataclass(frozen=True)
class LoggedRound:
    """One round of speculation, as the serving stack logged it."""

    num_drafted: int
    num_accepted: int
    drafted: Sequence[int] | None = None
    """The draft tokens; None: only their number is logged."""


@dataclass(frozen=True)
class Exchange:
    """What was asked and what was answered."""

    id: str
    prompt: str | list[dict[str, str]] | None
    """Text, or the turns of a chat; None: only its ids are logged."""
    answer: str | None
    """None: only its ids are logged, or the text is not what the target wrote (a parser took calls or thoughts out of it)."""
    prompt_ids: list[int] | None = None
    answer_ids: list[int] | None = None
    law: Law | None = None
    """What is logged of the target's law at the answered tokens."""
    rounds: Sequence[LoggedRound] | None = None
    """The rounds that wrote the answer, in their order; None: they are not logged."""
    finish: str = ""
    """stop, length, or another word of the server."""
    model: str = ""
    user: str = ""
    domain: str = ""
    num_prompt_tokens: int | None = None
    """As the server counted them."""
    num_answer_tokens: int | None = None
    template_arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """What the request hands the chat template, such as enable_thinking."""
    untold: str = ""
    """Why the prompt's text does not say what the target read (tools, pictures); empty: it does."""
    stops_on_text: bool = False
    """The request names words that end the answer, so that the end need not be the target's own."""


def text(value: Any, key: str) -> str:
    """Return text as it is.

    Raises:
        Refused: It is something else.
    """
    if not isinstance(value, str):
        raise Refused("wrong_type", f"{key}: text is needed, got {type(value).__name__}")
    return value


def mapping(value: Any, key: str) -> dict[str, Any]:
    """Return a mapping as it is, or refuse what is none."""
    if not isinstance(value, dict):
        raise Refused("wrong_type", f"{key}: a mapping is needed, got {type(value).__name__}")
    return value


def sequence(value: Any, key: str) -> list[Any]:
    """Return a list as it is, or refuse what is none."""
    if not isinstance(value, list):
        raise Refused("wrong_type", f"{key}: a list is needed, got {type(value).__name__}")
    return value


def ids(value: Any, key: str) -> list[int] | None:
    """Return token ids, None where nothing is logged, or refuse what is neither."""
    if value is None:
        return None
    if any(type(one) is not int for one in sequence(value, key)):
        raise Refused("wrong_type", f"{key}: token ids are whole numbers; a list that was cut for the log has others")
    return list(value)


def count(value: Any, key: str) -> int | None:
    """Return a number of tokens, None where nothing is logged, or refuse what is neither."""
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise Refused("wrong_type", f"{key}: a number of tokens is needed")
    return value


def log_probability(value: Any, key: str) -> float:
    """Return a log-probability, or refuse what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= 1e-3:
        raise Refused("logprobs", f"{key}: a log-probability is a number up to 0")
    # A whole number may be too large for a float.
    return float(max(value, -1e4))


def turns(value: Any, key: str) -> tuple[list[dict[str, str]], str]:
    """Return the turns of a chat in role and content, and why they do not say all that the target read."""
    found, untold = [], ""
    for number, turn in enumerate(sequence(value, key)):
        here = mapping(turn, f"{key}.{number}")
        role = text(here.get("role"), f"{key}.{number}.role")
        content, more = _content(here.get("content"), f"{key}.{number}.content")
        if here.get("tool_calls") or here.get("function_call") or role in ("tool", "function"):
            more = more or "tool_calls"
        untold = untold or more
        found.append({"role": role, "content": content})
    if not found:
        raise Refused("empty", f"{key}: no turn is here")
    return found, untold


def _content(value: Any, key: str) -> tuple[str, str]:
    """Return the text of a turn, and what else is in it."""
    if value is None:
        return "", ""
    if isinstance(value, str):
        return value, ""
    parts = [mapping(part, f"{key}.{i}") for i, part in enumerate(sequence(value, key))]
    words = [text(part.get("text"), key) for part in parts if part.get("type") == "text"]
    return "\n".join(words), "" if len(words) == len(parts) else "not_text"
