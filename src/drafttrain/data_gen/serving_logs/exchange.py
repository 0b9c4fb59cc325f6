"""One request and one answer to it, whatever log they were read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drafttrain.data_gen.bad_item import BadItem

LogProbs = Sequence[Sequence[tuple[int | str, float]]]
"""By answered token: (token, log-probability) pairs, the answered token first. A token is an id or its text."""


class Refused(BadItem):
    """Why a line of a log gives no record: a kind that is counted, and a sentence.

    The sentence never repeats the line: it is written to disk unredacted.
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
    """A request and its answer."""

    id: str
    prompt: str | list[dict[str, str]] | None
    """Text, or the turns of a chat; None: only its ids are logged."""
    answer: str | None
    """None: only its ids are logged, or the text is not all that the target wrote (a parser removed calls or thoughts)."""
    prompt_ids: list[int] | None = None
    answer_ids: list[int] | None = None
    logprobs: LogProbs | None = None
    """Logged log-probabilities of the target at the answered tokens."""
    rounds: Sequence[LoggedRound] | None = None
    """The rounds that wrote the answer, in their order; None: they are not logged."""
    finish: str = ""
    """Why the answer ended: stop, length, or another word of the server."""
    model: str = ""
    user: str = ""
    domain: str = ""
    num_prompt_tokens: int | None = None
    """As the server counted them."""
    num_answer_tokens: int | None = None
    template_arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the request for the chat template, such as enable_thinking."""
    incomplete: str = ""
    """Why the prompt's text is not all that the target read (tools, pictures); empty: it is."""
    stops_on_text: bool = False
    """The request has stop strings, so the target need not have written an end of text."""


def text(value: Any, key: str) -> str:
    """Return text unchanged.

    Raises:
        Refused: It is not text.
    """
    if not isinstance(value, str):
        raise Refused("wrong_type", f"{key}: must be text, got {type(value).__name__}")
    return value


def mapping(value: Any, key: str) -> dict[str, Any]:
    """Return a mapping unchanged; refuse anything else."""
    if not isinstance(value, dict):
        raise Refused("wrong_type", f"{key}: must be a mapping, got {type(value).__name__}")
    return value


def sequence(value: Any, key: str) -> list[Any]:
    """Return a list unchanged; refuse anything else."""
    if not isinstance(value, list):
        raise Refused("wrong_type", f"{key}: must be a list, got {type(value).__name__}")
    return value


def ids(value: Any, key: str) -> list[int] | None:
    """Return token ids, or None where none are logged; refuse anything else."""
    if value is None:
        return None
    if any(type(one) is not int for one in sequence(value, key)):
        raise Refused(
            "wrong_type",
            f"{key}: token ids must be integers; a list that was shortened for the log holds something else",
        )
    return list(value)


def count(value: Any, key: str) -> int | None:
    """Return a number of tokens, or None where none is logged; refuse anything else."""
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise Refused("wrong_type", f"{key}: must be a number of tokens")
    return value


def log_probability(value: Any, key: str) -> float:
    """Return a log-probability; refuse anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= 1e-3:
        raise Refused("logprobs", f"{key}: a log-probability must be a number up to 0")
    # An integer may be too large for a float.
    return float(max(value, -1e4))


def turns(value: Any, key: str) -> tuple[list[dict[str, str]], str]:
    """Return the turns of a chat (role and content), and why they are not all that the target read."""
    found, incomplete = [], ""
    for number, turn in enumerate(sequence(value, key)):
        here = mapping(turn, f"{key}.{number}")
        role = text(here.get("role"), f"{key}.{number}.role")
        content, more = _content(here.get("content"), f"{key}.{number}.content")
        if here.get("tool_calls") or here.get("function_call") or role in ("tool", "function"):
            more = more or "tool_calls"
        incomplete = incomplete or more
        found.append({"role": role, "content": content})
    if not found:
        raise Refused("empty", f"{key}: has no turn")
    return found, incomplete


def _content(value: Any, key: str) -> tuple[str, str]:
    """Return the text of a turn, and the kind of its other content."""
    if value is None:
        return "", ""
    if isinstance(value, str):
        return value, ""
    parts = [mapping(part, f"{key}.{i}") for i, part in enumerate(sequence(value, key))]
    words = [text(part.get("text"), key) for part in parts if part.get("type") == "text"]
    return "\n".join(words), "" if len(words) == len(parts) else "not_text"
