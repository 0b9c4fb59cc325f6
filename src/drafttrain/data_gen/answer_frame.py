"""Finds answers in token ids by the tokens that a chat template puts around them, and the faults of a mask there.

A mask that came with its row (input_ids and labels) was made by another program; this is how it is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.chat import Chat
from drafttrain.data_gen.chat_template import THOUGHT_MARKS, ChatTemplate, special_ids
from drafttrain.data_gen.plain_ids import begins


@dataclass(frozen=True)
class Answer:
    """The places of an answer in a row of ids."""

    header: int
    """Where its generation prompt begins."""
    begin: int
    """Where the generation prompt ends without thought marks."""
    written: int
    """Where the target begins to write: after the thought marks that the generation prompt holds."""
    end: int
    """After the token that ends it, or where the row or the answer breaks off."""
    is_ended: bool


@dataclass(frozen=True)
class AnswerFrame:
    """What a chat template puts around answers, in ids."""

    tokenizer: Any
    header: list[int]
    """The generation prompt without thought marks."""
    supplied: list[list[int]]
    """Thought marks that generation prompts add, with thinking as by default and off; the longest first."""
    ends: set[int]

    @classmethod
    def of(cls, template: ChatTemplate) -> AnswerFrame | None:
        """Return the frame of a template; None: it has no generation prompt."""
        by_default, quiet = (_generation_prompt(template, arguments) for arguments in ({}, {"enable_thinking": False}))
        head = THOUGHT_MARKS.split(by_default)[0]
        if not head.strip():
            return None
        header = template.ids(head)
        prompts = [template.ids(prompt) for prompt in {by_default, quiet} if prompt.startswith(head)]
        supplied = [prompt[len(header) :] for prompt in prompts if len(prompt) > len(header) and begins(prompt, header)]
        ends = {template.end, template.tokenizer.eos_token_id} - {None}
        return cls(template.tokenizer, header, sorted(supplied, key=len, reverse=True), ends)

    def answers(self, tokens: Sequence[int]) -> list[Answer]:
        """Return the answers in a row of ids."""
        size = len(self.header)
        heads = [place for place in range(len(tokens) - size + 1) if begins(tokens[place : place + size], self.header)]
        found = []
        for head, following in pairwise([*heads, len(tokens)]):
            begin = head + size
            marks = next((one for one in self.supplied if begins(tokens[begin : begin + len(one)], one)), [])
            end = next((i + 1 for i in range(begin, following) if tokens[i] in self.ends), None)
            found.append(Answer(head, begin, begin + len(marks), end or following, end is not None))
        return found

    def supplies_empty_thought(self, tokens: Sequence[int]) -> bool:
        """Return whether an answer begins with an empty thought that the template writes into a generation prompt."""
        return any(THOUGHT_MARKS.search(self._text(one)) and begins(tokens, one) for one in self.supplied)

    def faults(self, tokens: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[str, str]]:
        """Yield (kind, sentence) of what is wrong with the mask of a row that holds a rendered chat."""
        answers = self.answers(tokens)
        if not answers:
            return
        if all(mask[1:]):
            yield "all labels", "every token is a label, the questions too"
            return
        if any(any(mask[one.header : one.begin]) for one in answers):
            yield (
                "generation prompt",
                f"{self._text(self.header)!r} is a label: the target reads it and never writes it",
            )
        inside = {place for one in answers for place in range(one.header, one.end)}
        outside = [place for place, is_label in enumerate(mask) if is_label and place not in inside]
        if outside:
            yield (
                "outside answers",
                f"{len(outside)} labels outside answers, first {self._text(tokens[outside[0] :][:8])!r}",
            )
        for number, one in enumerate(answers):
            if any(mask[one.begin : one.end]):
                yield from self._of_answer(tokens, mask, one, f"answer {number}")

    def _of_answer(
        self, tokens: Sequence[int], mask: Sequence[bool], one: Answer, name: str
    ) -> Iterator[tuple[str, str]]:
        if any(mask[one.begin : one.written]):
            marks = self._text(tokens[one.begin : one.written])
            yield "thoughts", f"{name}: {marks!r} is a label, but the generation prompt holds it"
        labels = [place for place in range(one.begin, one.end) if mask[place]]
        stop = labels[-1] + 1
        # A call may end with another special token than a text.
        ends_otherwise = tokens[stop - 1] in special_ids(self.tokenizer) and self.ends.isdisjoint(
            tokens[stop : stop + 1]
        )
        end = stop if ends_otherwise else one.end
        lost = [place for place in range(one.written, end) if not mask[place]]
        words = self._text([tokens[place] for place in lost])
        if one.is_ended and lost == [one.end - 1]:
            yield "end of answer", f"{name}: {words!r} is no label: the drafter never learns where answers end"
        elif THOUGHT_MARKS.search(words):
            yield "thoughts", f"{name}: the target writes {words[:40]!r}, and it is no label"
        elif words.strip():
            yield "part of an answer", f"{name}: {len(lost)} of its tokens are no labels, first {words[:40]!r}"
        elif not one.is_ended and not ends_otherwise:
            yield "unfinished", f"{name}: it breaks off without a token that ends it"

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def _generation_prompt(template: ChatTemplate, arguments: dict[str, Any]) -> str:
    asked = Chat([{"role": "user", "content": "a"}], [False], arguments=arguments)
    try:
        before, prompt = template.text(asked), template.text(asked, asks=True)
    except BadItem:
        return ""
    return prompt[len(before) :] if prompt.startswith(before) else ""
