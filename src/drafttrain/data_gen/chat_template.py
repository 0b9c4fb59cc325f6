"""The chat template: the ids of a chat, the tokens of each answer, and which of them are labels."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import jinja2

from drafttrain.data_gen.bad_item import BadItem, foreign, one_line
from drafttrain.data_gen.chat import Chat
from drafttrain.data_gen.plain_ids import begins, continuation_ids, plain_ids
from drafttrain.data_gen.turns import REASONING

MARKS = re.compile(r"\{%[-+]?\s*generation\b")
THOUGHT_MARKS = re.compile(r"</?think(?:ing)?>")
WRITTEN = ("content", "tool_calls", *REASONING)
"""Keys of an answer that the target wrote: the text must hold all of them, or the labels are not what was written."""
DISAGREE = (
    "the template's {% generation %} marks differ from the tokens that the target writes after its prompt; the latter are "
    "trained"
)
MARKS_ALONE = (
    "the template renders an answer differently from its generation prompt; its {% generation %} marks are trained"
)


@dataclass(frozen=True)
class Part:
    """A chat, or a part of one that becomes a record, and the places of its answers."""

    tokens: list[int]
    answers: list[tuple[int, int, bool]]
    """(begin, end, whether it is trained)."""

    def mask(self, *, all_answers: bool = False) -> list[bool]:
        """Return by token whether it is a label."""
        mask_T = [False] * len(self.tokens)
        for begin, end, trained in self.answers:
            mask_T[begin:end] = [trained or all_answers] * (end - begin)
        return mask_T


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        notes: Notes for the user on how records were read, with counts.
        placeholder: The text that stands for an image; the template then reads turns in parts of text and images, if it can. None:
            it reads text.
    """

    tokenizer: Any
    notes: Counter[str] = field(default_factory=Counter)
    placeholder: str | None = None

    @property
    def exists(self) -> bool:
        """Return whether the tokenizer has a template."""
        return bool(self.tokenizer.chat_template)

    def prompt(self, chat: Chat) -> list[int]:
        """Return the ids that the target reads before it answers the last turn of another role."""
        count = len(chat.turns)
        while count and chat.turns[count - 1]["role"] == "assistant":
            count -= 1
        if not count:
            raise BadItem("no message before the assistant's")
        return self.ids(self.text(chat.until(count), asks=True))

    def parts(self, chat: Chat) -> list[Part]:
        """Return the whole chat, or parts of it, with its answers: the tokens that each adds to its generation prompt.

        A template that rewrites earlier turns (Qwen3 drops their thoughts) splits the chat: an answer whose context differs
        from the text so far begins a new part, the chat up to this answer as the target would read it.

        Raises:
            BadItem: The template fails, leaves out a part of an answer, or renders answers so that their tokens are unclear.
        """
        try:
            parts = self._by_prompts(chat)
        except _NoBoundary as error:
            parts = [self._by_marks(chat, error)]
        else:
            self._compare_with_marks(chat, parts)
        return parts

    def text(self, chat: Chat, *, asks: bool = False) -> str:
        """Return a chat as text.

        Args:
            asks: End with the generation prompt.

        Raises:
            BadItem: There is no template, it fails, or an argument belongs to the tokenizer.
        """
        return str(self._apply(chat, tokenize=False, add_generation_prompt=asks))

    def tokenized(self, chat: Chat, *, asks: bool = False) -> list[int]:
        """Return the ids of a chat by the tokenizer's own `apply_chat_template`, as other programs use it.

        Raises:
            BadItem: As `text`.
        """
        return list(self._apply(chat, tokenize=True, return_dict=True, add_generation_prompt=asks)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Return the ids of a chat's text, without special tokens of the tokenizer."""
        return plain_ids(self.tokenizer, text)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids that the template puts before and after every question, its generation prompt included; none without a template."""
        return self._around(asks=True)

    @cached_property
    def around_question(self) -> tuple[list[int], list[int]]:
        """Ids that the template puts before a question, and after it to end the user's turn; none without a template."""
        return self._around(asks=False)

    def _around(self, *, asks: bool) -> tuple[list[int], list[int]]:
        try:
            one, other = (self.ids(self.text(_question(word), asks=asks)) for word in ("a", "Z"))
        except BadItem:
            return [], []
        before, after = common_start(one, other), common_start(one[::-1], other[::-1])
        return one[:before], one[len(one) - after :]

    @cached_property
    def end(self) -> int | None:
        """The special token that the template puts after every answer; None: there is none."""
        try:
            tokens, begin = self._answer(_question("a", answer="b"), 1)
        except (BadItem, _NoBoundary):
            return None
        last = tokens[self._end(tokens, begin) - 1]
        return last if last in self._special else None

    def _by_prompts(self, chat: Chat) -> list[Part]:
        parts: list[Part] = []
        for count in range(len(chat.turns)):
            if not chat.is_answer(count):
                continue
            tokens, begin = self._answer(chat, count)
            answer = (begin, self._end(tokens, begin), chat.trained[count])
            continues = parts and begins(tokens[:begin], parts[-1].tokens)
            earlier = parts.pop().answers if continues else []
            parts.append(Part(tokens, [*earlier, answer]))
        whole = self.ids(self.text(chat)) if parts else []
        if parts and begins(whole, parts[-1].tokens):
            parts[-1] = replace(parts[-1], tokens=whole)
        return parts

    def _answer(self, chat: Chat, count: int) -> tuple[list[int], int]:
        """Return the ids of the chat up to one answer, and where the target begins to write it."""
        prompt, answered = self.text(chat.until(count), asks=True), self.text(chat.until(count + 1))
        self._check_whole(chat, count, answered)
        if answered.startswith(prompt):
            _check_thoughts(str(chat.turns[count]["content"]), answered[len(prompt) :], count)
        before, tokens = self.ids(prompt), self.ids(answered)
        if not begins(tokens, before) and answered.startswith(prompt):
            # One token spans the end of the prompt; the target reads the tokens of the prompt alone.
            tokens = before + continuation_ids(self.tokenizer, answered[len(prompt) :])
            if self._decoded(tokens) != self._decoded(self.ids(answered)):
                raise _NoBoundary
        if not begins(tokens, before):
            raise _NoBoundary
        return tokens, len(before)

    def _check_whole(self, chat: Chat, count: int, answered: str) -> None:
        """Refuse a template that leaves out a part of the target's answer."""
        turn = chat.turns[count]
        written = [name for name in WRITTEN if turn.get(name)]
        for name in written if len(written) > 1 or written != ["content"] else []:
            less = {key: value for key, value in turn.items() if key != name} | (
                {"content": ""} if name == "content" else {}
            )
            until = chat.until(count + 1)
            try:
                is_lost = self.text(replace(until, turns=[*until.turns[:-1], less])) == answered
            except BadItem:
                is_lost = False
            if is_lost:
                raise BadItem(
                    f"the chat template leaves out {name!r} of an answer (turn {count}): "
                    "the target's text is not known; ignore_keys of the source drops the key"
                )

    def _by_marks(self, chat: Chat, error: _NoBoundary) -> Part:
        """Return the chat by the template's {% generation %} marks, if each answer has one that holds its text."""
        marked = self._marked(chat)
        answers = [number for number, turn in enumerate(chat.turns) if turn["role"] == "assistant"]
        if marked is not None:
            tokens, mask_T = marked
            spans = _spans(mask_T)
            words = [chat.turns[number]["content"].strip() for number in answers]
            if len(spans) == len(words) and all(
                word in self._decoded(tokens[begin:end]) for word, (begin, end) in zip(words, spans, strict=True)
            ):
                self.notes[MARKS_ALONE] += 1
                flags = [chat.trained[number] and number > 0 for number in answers]
                return Part(tokens, [(*span, flag) for span, flag in zip(spans, flags, strict=True)])
        raise BadItem(
            "the chat template renders an answer differently from its generation prompt: the assistant's tokens are unclear"
        ) from error

    def _compare_with_marks(self, chat: Chat, parts: Sequence[Part]) -> None:
        """Count a chat whose marks differ from what the target writes."""
        if len(parts) != 1 or (marked := self._marked(chat)) is None:
            return
        tokens, mask_T = marked
        # An answer that opens a chat is no label here, whatever the marks say.
        first = parts[0].answers[0][0] if chat.turns[0]["role"] == "assistant" else 0
        if tokens != parts[0].tokens or mask_T[first:] != parts[0].mask(all_answers=True)[first:]:
            self.notes[DISAGREE] += 1

    def _marked(self, chat: Chat) -> tuple[list[int], list[bool]] | None:
        """Return ids and the mask of the template's marks; None if it has none, or the tokenizer cannot locate them."""
        if not MARKS.search(str(self.tokenizer.chat_template)):
            return None
        try:
            coded = self._apply(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        except BadItem:
            return None
        return list(coded["input_ids"]), [bool(flag) for flag in coded["assistant_masks"]]

    def _apply(self, chat: Chat, *, calls_in_text: bool | None = None, **wanted: Any) -> Any:
        if not self.exists:
            raise BadItem("a chat, but the tokenizer has no chat template: use prompt and completion, or text")
        # A record must not replace the template, nor ask for tensors.
        if reserved := set(chat.arguments) & set(inspect.signature(self.tokenizer.apply_chat_template).parameters):
            raise BadItem(f"{min(reserved)}: is not an argument of a chat template")
        if calls_in_text is None:
            calls_in_text = any("tool_calls" in turn for turn in chat.turns) and self._calls_in_text
        # A template is a program and a stranger's chat its input: it may fail in any way.
        with foreign("the chat template fails on this chat"):
            try:
                return self.tokenizer.apply_chat_template(
                    self._turns(chat, calls_in_text=calls_in_text), **chat.inputs, **wanted, **chat.arguments
                )
            except jinja2.TemplateError as error:
                raise BadItem(f"the chat template refuses this chat: {one_line(error)}") from error

    def _turns(self, chat: Chat, *, calls_in_text: bool) -> list[dict[str, Any]]:
        """Return the turns with thoughts under the key that the template reads: servers and data sets use several."""
        source = str(self.tokenizer.chat_template)
        read = next((name for name in REASONING if name in source), None)
        turns = [
            {
                read if read and key in REASONING and key not in source else key: value
                for key, value in (with_text(turn) if calls_in_text else turn).items()
            }
            for turn in chat.turns
        ]
        if self.placeholder is None or not self._reads_parts:
            return turns
        return [in_parts(turn, self.placeholder) for turn in turns]

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template reads turns in parts; one that reads text fails on a list, or writes it as Python or JSON does."""
        text, parts = (self._asked(content) for content in ("a", [{"type": "text", "text": "a"}]))
        if text is None or parts is None:
            return parts is not None or text is None
        return not any(key in parts for key in ("'type'", '"type"'))

    def _asked(self, content: Any) -> str | None:
        """Return a user's message as text; None: the template fails on it."""
        turns = [{"role": "user", "content": content}]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except Exception:  # templates are programs and raise anything
            return None

    @cached_property
    def _calls_in_text(self) -> bool:
        """Whether the template needs the arguments of calls as JSON text (DeepSeek's does) and fails on an object."""
        try:
            self._apply(_CALLED, calls_in_text=False, tokenize=False)
        except BadItem:
            pass
        else:
            return False
        try:
            return _NAME in str(self._apply(_CALLED, calls_in_text=True, tokenize=False))
        except BadItem:
            return False

    def _end(self, tokens: Sequence[int], begin: int) -> int:
        """Return where the target stops: after the special token that ends the answer, if only white space follows."""
        place = written(self.tokenizer, tokens)
        return place if place > begin and tokens[place - 1] in self._special else len(tokens)

    @cached_property
    def _special(self) -> set[int]:
        return special_ids(self.tokenizer)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class _NoBoundary(Exception):
    """An answer does not follow its generation prompt, so its first token is not known."""


def written(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Return the number of tokens without white space at the end."""
    place = len(tokens)
    while place and not str(tokenizer.decode(tokens[place - 1 : place], clean_up_tokenization_spaces=False)).strip():
        place -= 1
    return place


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of tokens that were added to the vocabulary by name, special or not."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that two texts share at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _question(question: str, *, answer: str | None = None) -> Chat:
    turns: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return Chat(turns, [turn["role"] == "assistant" for turn in turns])


def _check_thoughts(content: str, answer: str, count: int) -> None:
    """Refuse an answer with thoughts in its content that the template leaves out (DeepSeek's does)."""
    words = "".join(answer.split())
    for part in THOUGHT_MARKS.split(content):
        if "".join(part.split()) not in words:
            raise BadItem(
                f"the chat template leaves out a part of 'content' of an answer (turn {count}), from {part.strip()[:20]!r}: "
                "the target's text is not known"
            )


def in_parts(turn: dict[str, Any], placeholder: str) -> dict[str, Any]:
    """Return a turn whose content is in parts, as templates of multimodal models read it; an image takes the line end after it."""
    first, *others = turn["content"].split(placeholder)
    parts = [{"type": "text", "text": first}] if first or not others else []
    for text in others:
        words = text.removeprefix("\n")
        parts += [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
    return turn | {"content": parts}


def with_text(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with the arguments of its calls as JSON text, as in OpenAI's API."""
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), Mapping):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append(call | {"function": function})
    return turn | {"tool_calls": calls}


def _spans(mask_T: Sequence[bool]) -> list[tuple[int, int]]:
    """Return where marked tokens begin and end."""
    spans, place = [], 0
    for is_marked, run in groupby(mask_T):
        size = len(list(run))
        if is_marked:
            spans.append((place, place + size))
        place += size
    return spans


_NAME = "weather_of"
_CALLED = Chat(
    [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "abcdefghi", "type": "function", "function": {"name": _NAME, "arguments": {"city": "b"}}}
            ],
        },
    ],
    [False, True],
)
"""A chat whose answer is a call, to test how a template renders it."""
