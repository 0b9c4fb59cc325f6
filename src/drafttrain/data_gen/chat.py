"""From a record to a chat: its turns, which answers are trained, and the other inputs of the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.record_keys import ANSWERS, Reading
from drafttrain.data_gen.turns import assistant, json_of, read_turns, text_of, user

Turn = tuple[dict[str, Any], bool]


@dataclass(frozen=True)
class Chat:
    """A chat as input of a chat template."""

    turns: Sequence[dict[str, Any]]
    trained: Sequence[bool]
    """By turn: whether it is a trained answer."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Inputs of the template beside the turns: tools and documents."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """`chat_template_kwargs` of the record."""

    def until(self, count: int) -> Chat:
        """Return the chat up to its first `count` turns."""
        return replace(self, turns=self.turns[:count], trained=self.trained[:count])

    def is_answer(self, number: int) -> bool:
        """Return whether a turn answers another one; the first turn of a chat does not."""
        return number > 0 and self.turns[number]["role"] == "assistant"


def chat_of(form: str, value: Mapping[str, Any], reading: Reading) -> Chat:
    """Return the chat of a record of one of the forms that are chats.

    Raises:
        BadItem: A part is missing or has the wrong type.
    """
    turns = _turns(form, value, reading)
    system = [text_of(value[key], key) for key in ("system", "system_prompt") if value.get(key) not in (None, "", [])]
    first = [turns[0][0]["content"]] if turns[0][0]["role"] == "system" else []
    if len({*system, *first}) > 1:
        raise BadItem("system: two system prompts that differ")
    if system and not first:
        turns = [({"role": "system", "content": system[0]}, False), *turns]
    last = max((number for number, (turn, _) in enumerate(turns) if turn["role"] == "assistant"), default=0)
    own = _mapping(json_of(value.get("chat_template_kwargs") or {}, "chat_template_kwargs"))
    return Chat(
        [turn for turn, _ in turns],
        [trained and (reading.answers == "all" or number == last) for number, (_, trained) in enumerate(turns)],
        inputs=_inputs(value),
        arguments={**reading.chat_template_kwargs, **own},
    )


def prompt_is_chat(value: Mapping[str, Any]) -> bool:
    """Return whether `prompt` holds turns, or text that the record marks as a user's turn."""
    return isinstance(value["prompt"], list) or value.get("chat") is True


def _turns(form: str, value: Mapping[str, Any], reading: Reading) -> list[Turn]:
    if form in ("messages", "conversations"):
        return read_turns(value[form], form, reading)
    if form == "turns":
        # Later turns (MT-bench) ask about an answer that the record does not hold.
        asked = value["turns"]
        if not isinstance(asked, list) or not asked:
            raise BadItem("turns: must be a list of texts")
        return [user(asked[0], "turns.0")] if isinstance(asked[0], str) else read_turns(asked, "turns", reading)
    if form == "prompt":
        return _prompt(value, reading)
    key = answer_key(form, value)
    asked = text_of(value[form], form)
    if more := value.get("input"):
        asked = f"{asked}\n{text_of(more, 'input')}"
    turns = [*_history(value.get("history") or []), user(asked, form)]
    return turns if key is None else [*turns, assistant(value[key], key)]


def _prompt(value: Mapping[str, Any], reading: Reading) -> list[Turn]:
    prompt = value["prompt"]
    turns = read_turns(prompt, "prompt", reading) if isinstance(prompt, list) else [user(prompt, "prompt")]
    key = answer_key("prompt", value)
    if key is None:
        return turns
    answer = value[key]
    return [*turns, *(read_turns(answer, key, reading) if isinstance(answer, list) else [assistant(answer, key)])]


def answer_key(form: str, value: Mapping[str, Any]) -> str | None:
    """Return the key that holds the answer to a question.

    Raises:
        BadItem: Two keys hold one.
    """
    found = [key for key in ANSWERS[form] if key in value]
    if len(found) > 1:
        raise BadItem(f"{' and '.join(found)}: two answers in one record; name one in ignore_keys of the source")
    return found[0] if found else None


def _history(pairs: Any) -> list[Turn]:
    """Return earlier questions and answers, in the form of LLaMA-Factory's Alpaca records."""
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise BadItem("history: must be a list of [question, answer]")
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns += [user(question, f"history.{number}.0"), assistant(answer, f"history.{number}.1")]
    return turns


def _inputs(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return tools and documents in the form that templates read."""
    found: dict[str, Any] = {}
    for key, name in (("functions", "tools"), ("tools", "tools"), ("documents", "documents")):
        if value.get(key) not in (None, "", [], {}):
            listed = json_of(value[key], key)
            if not isinstance(listed, list) or any(not isinstance(one, Mapping) for one in listed):
                raise BadItem(f"{key}: must be a list of mappings")
            if listed:
                found[name] = [_tool(one) for one in listed] if name == "tools" else listed
    return found


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool under `function`, as servers pass it to the template."""
    return dict(tool) if "function" in tool or "name" not in tool else {"type": "function", "function": dict(tool)}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadItem(f"chat_template_kwargs: must be a mapping, got {type(value).__name__}")
    return dict(value)
