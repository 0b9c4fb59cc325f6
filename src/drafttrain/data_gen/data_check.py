"""Reads a source as training does and looks for faults: of masks, templates, answers, and repeated items."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from drafttrain.core.texts import Record
from drafttrain.data_gen.answer_frame import AnswerFrame
from drafttrain.data_gen.bad_item import BadItem, NoLabel
from drafttrain.data_gen.chat import Chat, chat_of
from drafttrain.data_gen.chat_template import THOUGHT_MARKS, common_start
from drafttrain.data_gen.encoder import UNTEMPLATED, Encoder, is_chat
from drafttrain.data_gen.plain_ids import begins
from drafttrain.data_gen.quarantine import read_item
from drafttrain.data_gen.record_keys import MASKS, form_of
from drafttrain.data_gen.sources import RecordSource, Source
from drafttrain.data_gen.stored.records import records_of

KINDS = {
    "quarantined": "the item is not trained; docs/data.md lists what is read",
    "no label": "the item is not trained: name the trained answers, or remove it",
    "all labels": "mask the questions: -100 in labels, or a loss_mask",
    "generation prompt": "begin labels after the generation prompt",
    "thoughts": "label what the target writes: its thoughts, and no marks that its prompt holds; "
    "chat_template_kwargs: {enable_thinking: false} for answers without thoughts",
    "end of answer": "label the token that ends an answer",
    "outside answers": "are the labels shifted, or of another template?",
    "part of an answer": "label whole answers, or none of their tokens",
    "marks": "the template's {% generation %} marks are compared with what the target writes; docs/data.md, Labels",
    "untemplated": "chat: true of the source makes 'prompt' a message",
    "rewritten": "each answer is trained in the context that the target would read: more records, no loss",
    "cut": "raise data.max_length, or accept that these labels are not trained",
    "unfinished": "remove answers that were cut off: their last token is no end",
    "duplicate": "remove all but one",
    "rendering": "another program that tokenizes this chat trains other tokens than the target reads here",
    "server": "serve the same tokenizer and template; the drafter would see other tokens than it was trained on",
}
"""By kind of finding: what to do."""
NOTES = ("marks", "rewritten", "rendering")
"""Kinds that are no fault of the trained labels: other programs would train differently on the item."""
Found = tuple[str, str]
"""A kind of finding and a sentence."""
LENGTH = ("length", "max_tokens", "max_output_tokens")
"""Finish reasons of answers that were cut off."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with an item, or must be known about it."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class ReadItem:
    """An item of a source as training reads it."""

    where: str
    records: Sequence[Record] = ()
    reason: str = ""
    """Why it gives no record; empty: it gives some."""
    findings: Sequence[Finding] = ()
    chat: Chat | None = None
    """The chat, if the item is one that gives records."""


@dataclass(frozen=True)
class Checker:
    """Checks the items of a source; finds items that repeat those of earlier sources too.

    Args:
        places: By digest of the text of an item, its place. Checkers of several sources share it.
    """

    source: Source
    encoder: Encoder
    places: dict[bytes, str] = field(default_factory=dict)

    def items(self, *, max_items: int | None = None) -> Iterator[ReadItem]:
        """Yield every item with what was found."""
        for item in islice(self.source.items(), max_items):
            self.encoder.notes.clear()
            try:
                records = read_item(item, lambda item: records_of(item, self.source, self.encoder))
            except BadItem as reason:
                kind = "no label" if isinstance(reason, NoLabel) else "quarantined"
                yield ReadItem(item.where, reason=str(reason), findings=[Finding(kind, item.where, str(reason))])
                continue
            found = [*self._of_notes(), *self._of_text(records, item.where)]
            chat = None
            if not isinstance(self.source, RecordSource):
                form, value = form_of(item.value, self.encoder.reading)
                found += _of_finish(value)
                if is_chat(form, value):
                    chat = chat_of(form, value, self.encoder.reading)
                    found += self._of_chat(chat)
                else:
                    found += self._of_rows(form, value)
            findings = [Finding(kind, item.where, what) for kind, what in dict.fromkeys(found)]
            yield ReadItem(item.where, records, findings=findings, chat=chat)

    @cached_property
    def _frame(self) -> AnswerFrame | None:
        return AnswerFrame.of(self.encoder.template) if self.encoder.template.exists else None

    def _of_notes(self) -> Iterator[Found]:
        for note in self.encoder.notes:
            yield ("untemplated" if note == UNTEMPLATED else "marks"), note

    def _of_text(self, records: Sequence[Record], where: str) -> Iterator[Found]:
        """Yield that an earlier item has the same text, apart from case and white space."""
        text = "".join("".join(self.encoder.decoded(one.tokens) for one in records).casefold().split())
        first = self.places.setdefault(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest(), where)
        if first != where:
            yield "duplicate", f"has the text of {first}"

    def _of_rows(self, form: str, value: Mapping[str, Any]) -> Iterator[Found]:
        """Yield what is wrong with the mask of an item that no template reads here; it may hold a rendered chat."""
        if form == "text":
            tokens = self.encoder.raw.begun(value[form])
            mask = [True] * len(tokens)
        else:
            ((tokens, mask),) = self.encoder.rows(form, value)
            yield from self._of_length(mask)
        if all(mask[1:]) and any(key in value for key in ("labels", *MASKS)):
            yield "all labels", "its mask leaves out nothing"
        elif self._frame is not None:
            yield from self._frame.faults(tokens, mask)

    def _of_length(self, mask: Sequence[bool]) -> Iterator[Found]:
        limit = self.encoder.max_length
        if behind := sum(mask[limit:]):
            yield "cut", f"{behind} of {sum(mask)} labels are behind the first {limit} tokens"

    def _of_chat(self, chat: Chat) -> Iterator[Found]:
        parts = self.encoder.template.parts(chat)
        if len(parts) > 1:
            yield "rewritten", f"the chat template rewrites earlier turns: {len(parts)} records instead of one"
        for part in parts:
            yield from self._of_length(part.mask())
        places = [(part.tokens, begin, trained) for part in parts for begin, _, trained in part.answers]
        texts = [str(turn["content"]) for turn in chat.turns if turn["role"] == "assistant"]
        # Parts may leave out an answer that opens the chat.
        texts = texts[len(texts) - len(places) :]
        for text, (tokens, begin, trained) in zip(texts, places, strict=True):
            opened, closed = (
                sum(mark.startswith("</") is end for mark in THOUGHT_MARKS.findall(text)) for end in (False, True)
            )
            if opened > closed:
                yield "unfinished", "a thought is opened and not closed"
            if trained and not opened and self._frame and self._frame.supplies_empty_thought(tokens[begin:]):
                yield "thoughts", "the template puts an empty thought into an answer that has none, and it is a label"
        yield from self._of_rendering(chat, parts[-1].tokens)

    def _of_rendering(self, chat: Chat, tokens: Sequence[int]) -> Iterator[Found]:
        """Yield that the tokenizer's own rendering of the chat differs from the tokens that are trained."""
        theirs = self.encoder.template.tokenized(until_last_answer(chat))
        if not begins(tokens, theirs):
            yield "rendering", difference(tokens, theirs, self.encoder, of="the tokenizer's apply_chat_template")


def until_last_answer(chat: Chat) -> Chat:
    """Return the chat without the turns that follow its last answer."""
    return chat.until(max(number for number in range(len(chat.turns)) if chat.is_answer(number)) + 1)


def difference(ours: Sequence[int], theirs: Sequence[int], encoder: Encoder, *, of: str) -> str:
    """Return a sentence about the first token at which the ids of another program differ from ours."""
    place = common_start(ours, theirs)
    here, there = (encoder.decoded(one[place : place + 4]) for one in (ours, theirs))
    return f"token {place}: {here!r} here, {there!r} by {of} ({len(ours)} and {len(theirs)} tokens)"


def _of_finish(value: Mapping[str, Any]) -> Iterator[Found]:
    """Yield that a record or one of its turns says that an answer was cut off."""
    turns = [turn for part in value.values() if isinstance(part, list) for turn in part if isinstance(turn, Mapping)]
    for part in (value, *turns):
        if part.get("finish_reason") in LENGTH:
            yield "unfinished", f"finish_reason is {part['finish_reason']!r}"
