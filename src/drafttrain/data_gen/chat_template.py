"""What a target reads and writes of a chat: its chat template, the tokens of each answer, and which of them are labels."""

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
"""Keys of an answer that the target wrote: all of them must be in the text, or its label is not what was written."""
DISAGREE = "the template's {% generation %} marks other tokens than the target writes behind its prompt; the latter are trained"
MARKS_ALONE = (
    "the template writes an answer differently from how it asks for one; its {% generation %} marks are trained"
)


@dataclass(frozen=True)
class Part:
    """A chat, or a part of one that is read as a whole, and where the answers in it are."""

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
        notes: Counts what a user should know of how records were read.
    """

    tokenizer: Any
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def exists(self) -> bool:
        """Return whether the tokenizer has a template."""
        return bool(self.tokenizer.chat_template)

    def prompt(self, chat: Chat) -> list[int]:
        """Return the ids that the target reads before it answers the last turn that is no answer."""
        count = len(chat.turns)
        while count and chat.turns[count - 1]["role"] == "assistant":
            count -= 1
        if not count:
            raise BadItem("no message before the assistant's")
        return self.ids(self.text(chat.until(count), asks=True))

    def parts(self, chat: Chat) -> list[Part]:
        """Return the whole chat, or parts of it, with its answers: what each adds to the text that asks for it.

        A template that rewrites earlier turns (Qwen3 drops their thoughts) divides the chat: an answer whose context is not
        the text so far begins a part of its own, the chat up to this answer as the target would read it.

        Raises:
            BadItem: The template fails, leaves out a part of an answer, or writes answers so that they cannot be told apart.
        """
        try:
            parts = self._by_prompts(chat)
        except _NotApart as error:
            parts = [self._by_marks(chat, error)]
        else:
            self._compare_with_marks(chat, parts)
        return parts

    def text(self, chat: Chat, *, asks: bool = False) -> str:
        """Return a chat as text.

        Args:
            asks: End with what asks for an answer.

        Raises:
            BadItem: There is no template, it fails, or an argument means something to the tokenizer.
        """
        return str(self._apply(chat, tokenize=False, add_generation_prompt=asks))

    def ids(self, text: str) -> list[int]:
        """Return the ids of a chat's text, to which the tokenizer adds nothing."""
        return plain_ids(self.tokenizer, text)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """What the template puts before and after every question; nothing where there is no template."""
        try:
            one, other = (self.prompt(_question(word)) for word in ("a", "Z"))
        except BadItem:
            return [], []
        before, after = common_start(one, other), common_start(one[::-1], other[::-1])
        return one[:before], one[len(one) - after :]

    @cached_property
    def end(self) -> int | None:
        """The special token that the template puts behind every answer; None: there is none."""
        try:
            tokens, begin = self._answer(_question("a", answer="b"), 1)
        except (BadItem, _NotApart):
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
        """Return the chat up to one answer, and where the target begins to write it."""
        asked, answered = self.text(chat.until(count), asks=True), self.text(chat.until(count + 1))
        self._check_whole(chat, count, answered)
        if answered.startswith(asked):
            _check_thoughts(str(chat.turns[count]["content"]), answered[len(asked) :], count)
        before, tokens = self.ids(asked), self.ids(answered)
        if not begins(tokens, before) and answered.startswith(asked):
            # A token reaches over the place where the target begins; it reads the prompt's own tokens.
            tokens = before + continuation_ids(self.tokenizer, answered[len(asked) :])
            if self._decoded(tokens) != self._decoded(self.ids(answered)):
                raise _NotApart
        if not begins(tokens, before):
            raise _NotApart
        return tokens, len(before)

    def _check_whole(self, chat: Chat, count: int, answered: str) -> None:
        """Refuse a template that leaves out a part of what the target wrote."""
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
                    f"the chat template leaves {name!r} of an answer out (turn {count}): "
                    "the target's text cannot be known; ignore_keys of the source drops the key"
                )

    def _by_marks(self, chat: Chat, error: _NotApart) -> Part:
        """Return the chat by the template's own marks, where each answer has one that holds its text."""
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
            "the chat template writes an answer differently from how it asks for one: the assistant's tokens cannot be told apart"
        ) from error

    def _compare_with_marks(self, chat: Chat, parts: Sequence[Part]) -> None:
        """Count a chat whose marks are not what the target writes."""
        if len(parts) != 1 or (marked := self._marked(chat)) is None:
            return
        tokens, mask_T = marked
        first = parts[0].answers[0][0]
        if tokens != parts[0].tokens or mask_T[first:] != parts[0].mask(all_answers=True)[first:]:
            self.notes[DISAGREE] += 1

    def _marked(self, chat: Chat) -> tuple[list[int], list[bool]] | None:
        """Return ids and the template's own mask; None where it has no marks, or the tokenizer cannot place them."""
        if not MARKS.search(str(self.tokenizer.chat_template)):
            return None
        try:
            coded = self._apply(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        except BadItem:
            return None
        return list(coded["input_ids"]), [bool(flag) for flag in coded["assistant_masks"]]

    def _apply(self, chat: Chat, *, calls_in_text: bool | None = None, **wanted: Any) -> Any:
        if not self.exists:
            raise BadItem("a chat, but the tokenizer has no chat template: give prompt and completion, or text")
        # A record must not replace the template, nor ask for tensors.
        if reserved := set(chat.arguments) & set(inspect.signature(self.tokenizer.apply_chat_template).parameters):
            raise BadItem(f"{min(reserved)}: is no argument of a chat template")
        if calls_in_text is None:
            calls_in_text = any("tool_calls" in turn for turn in chat.turns) and self._calls_in_text
        # A template is a program, and a stranger's chat its input: it may fail in any way.
        with foreign("the chat template fails on this chat"):
            try:
                return self.tokenizer.apply_chat_template(
                    self._turns(chat, calls_in_text=calls_in_text), **chat.given, **wanted, **chat.arguments
                )
            except jinja2.TemplateError as error:
                raise BadItem(f"the chat template refuses this chat: {one_line(error)}") from error

    def _turns(self, chat: Chat, *, calls_in_text: bool) -> list[dict[str, Any]]:
        """Return the turns with thoughts under the name that the template reads: servers and data sets have several."""
        source = str(self.tokenizer.chat_template)
        read = next((name for name in REASONING if name in source), None)
        return [
            {
                read if read and key in REASONING and key not in source else key: value
                for key, value in (_with_text(turn) if calls_in_text else turn).items()
            }
            for turn in chat.turns
        ]

    @cached_property
    def _calls_in_text(self) -> bool:
        """Whether the template wants the arguments of calls as JSON in a text (DeepSeek's does): it fails on an object."""
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
        """Return where the target stops: behind the special token that ends the answer, if only white space follows it."""
        place = written(self.tokenizer, tokens)
        return place if place > begin and tokens[place - 1] in self._special else len(tokens)

    @cached_property
    def _special(self) -> set[int]:
        return special_ids(self.tokenizer)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class _NotApart(Exception):
    """An answer is not what follows the text that asks for it."""


def written(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Return how many tokens there are without the white space at the end."""
    place = len(tokens)
    while place and not str(tokenizer.decode(tokens[place - 1 : place], clean_up_tokenization_spaces=False)).strip():
        place -= 1
    return place


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of tokens that were added to a vocabulary by name, special or not."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts share from their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _question(question: str, *, answer: str | None = None) -> Chat:
    turns: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return Chat(turns, [turn["role"] == "assistant" for turn in turns])


def _check_thoughts(content: str, answer: str, count: int) -> None:
    """Refuse an answer whose thoughts stand in its content and that the template writes without them (DeepSeek's does)."""
    words = "".join(answer.split())
    for part in THOUGHT_MARKS.split(content):
        if "".join(part.split()) not in words:
            raise BadItem(
                f"the chat template leaves a part of 'content' of an answer out (turn {count}), from {part.strip()[:20]!r}: "
                "the target's text cannot be known"
            )


def _with_text(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with the arguments of its calls as JSON in a text, as OpenAI's API has them."""
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
"""A chat whose answer is a call, to see how a template takes it."""
