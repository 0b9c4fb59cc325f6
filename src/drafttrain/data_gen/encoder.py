"""From an item of a source to records: its form, its tokens, and which of them are labels. docs/data.md lists the forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from drafttrain.core.console import say
from drafttrain.core.images import Image
from drafttrain.core.texts import Record
from drafttrain.data_gen.bad_item import BadItem, NoLabel
from drafttrain.data_gen.chat import Chat, answer_key, chat_of, prompt_is_chat
from drafttrain.data_gen.chat_template import ChatTemplate
from drafttrain.data_gen.plain_ids import continuation_ids
from drafttrain.data_gen.raw_text import RawText
from drafttrain.data_gen.record_images import NO_READER, images_of, with_images, with_placeholders
from drafttrain.data_gen.record_keys import FOR_TEMPLATE, IMAGES, Reading, form_of
from drafttrain.data_gen.token_rows import token_row
from drafttrain.data_gen.turns import text_of, unicode_text
from drafttrain.target_model.image_reader import ImageReader
from drafttrain.target_model.tokenizer import num_ids

TOKENS = ("tokens", "input_ids")
PLAIN = ("text", *TOKENS)
UNTEMPLATED = (
    "text under 'prompt' is read without the tokenizer's chat template; chat: true of the source or in the record, or the "
    "text under 'question', makes it a chat"
)


@dataclass(frozen=True)
class Encoder:
    """Turns items into token ids by one tokenizer."""

    tokenizer: Any
    max_length: int
    reading: Reading = field(default_factory=Reading)
    """How the records of the current source are read."""
    notes: Counter[str] = field(default_factory=Counter)
    """Notes for the user on how records were read, with counts."""
    images: ImageReader | None = None
    """Reads images; None: records with images are refused."""

    @cached_property
    def size(self) -> int:
        """Number of the tokenizer's ids, from 0."""
        return num_ids(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer, self.notes, None if self.images is None else self.images.placeholder)

    @cached_property
    def raw(self) -> RawText:
        """Reads text without a template."""
        return RawText(self.tokenizer, self.template)

    def reading_as(self, settings: Any) -> Encoder:
        """Return an encoder for the records of a source with these settings."""
        return replace(self, reading=Reading.of(settings), notes=Counter())

    def report(self, name: str) -> None:
        """Print the notes on how records were read."""
        for note, count in self.notes.items():
            say(f"{name}: {count:,} records: {note}")

    def records(self, value: Mapping[str, Any], *, id: str) -> list[Record]:
        """Return the records of an item: several for plain text longer than `max_length`.

        Raises:
            BadItem: The item has no known form, has an unknown key, or has no label.
        """
        form, value = form_of(value, self.reading)
        id, domain = _id(value, id), str(value.get("domain", ""))
        images = self._images(form, value)
        if form == "text":
            return self._windows(value["text"], id=id, domain=domain)
        rows = [self._seen(*row, images) for row in self.rows(form, value)]
        records = [
            Record(id if len(rows) == 1 else f"{id}@{i}", self._first(tokens), mask, domain=domain, images=tuple(own))
            for i, (tokens, whole_mask, own) in enumerate(rows)
            for mask in [whole_mask[: self.max_length]]
            if any(mask[1:])
        ]
        if not records:
            raise NoLabel(f"no token of the first {self.max_length} is a label (part of a trained answer)")
        return records

    def rows(self, form: str, value: Mapping[str, Any]) -> list[tuple[list[int], list[bool]]]:
        """Return (ids, whether each is a label) of the texts of an item that is not plain text, before they are cut.

        Args:
            form: The form of the record and its keys, as `form_of` returns them.

        Raises:
            BadItem: The item cannot be read.
        """
        if form in TOKENS:
            return [token_row(form, value, num_ids=self.size)]
        if not is_chat(form, value):
            return [self._completion(value)]
        return [(part.tokens, part.mask()) for part in self.template.parts(chat_of(form, value, self.reading))]

    def prompts(self, value: Mapping[str, Any], *, id: str, prompt_tokens: int | None) -> list[tuple[str, list[int]]]:
        """Return (id, tokens) of the prompts of an item: a chat up to its last answer, text in pieces.

        Raises:
            BadItem: The item has no known form, or no prompt leaves room for an answer within `max_length`.
        """
        form, value = form_of(value, self.reading)
        id = _id(value, id)
        images = self._images(form, value)
        tokens = self._prompt(form, value)
        tokens, _, _ = self._seen(tokens, [False] * len(tokens), images)
        prompts = [(id, tokens)]
        if images and tokens[-1] == self._reader.visual_id:
            raise BadItem(f"{IMAGES}: the prompt ends with an image: the target answers after text")
        if images and prompt_tokens is not None and form in PLAIN:
            raise BadItem(f"{IMAGES}: a prompt with images is not cut into pieces of prompt_tokens")
        if prompt_tokens is not None and form in PLAIN:
            pieces = [tokens[start : start + prompt_tokens] for start in range(0, len(tokens), prompt_tokens)]
            prompts = [(f"{id}@{i * prompt_tokens}", p) for i, p in enumerate(pieces) if len(p) == prompt_tokens]
            if not prompts:
                raise BadItem(f"{len(tokens)} tokens, fewer than the {prompt_tokens} of a prompt")
        fitting = [(id, tokens) for id, tokens in prompts if 0 < len(tokens) < self.max_length]
        if not fitting:
            raise BadItem(f"a prompt must have 1..{self.max_length - 1} tokens: this one has {len(prompts[0][1])}")
        return fitting

    def images_of(self, value: Mapping[str, Any]) -> list[Image]:
        """Return the images of an item."""
        return images_of(self.reading.without_ignored(self.reading.renamed(value)))

    def later_questions(self, value: Mapping[str, Any]) -> tuple[Chat | None, list[str]]:
        """Return the chat of an item's first question, and its later ones (MT-bench); None: it has no later ones.

        Raises:
            BadItem: A question is no text.
        """
        form, value = form_of(value, self.reading)
        asked = value[form]
        if form != "turns" or len(asked) < 2 or not isinstance(asked[0], str):
            return None, []
        if value.get(IMAGES):
            raise BadItem(
                f"{IMAGES}: later questions of a conversation with images are not asked: give its first alone"
            )
        later = [text_of(question, f"turns.{number}") for number, question in enumerate(asked[1:], 1)]
        return chat_of(form, value, self.reading), later

    def frame(self) -> tuple[list[int], list[int]]:
        """Return the ids that the chat template puts before and after every prompt; none without a template."""
        return self.template.around

    def decoded(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def text(self, text: Any) -> list[int]:
        """Return the ids of text as a server reads it: with the tokenizer's special tokens, even if the text has them already."""
        return list(self.tokenizer(text_of(text, "text")).input_ids)

    def chat_ids(
        self, messages: Sequence[dict[str, Any]], arguments: Mapping[str, Any], *, add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the ids of a chat as the target reads it.

        Args:
            arguments: Arguments of the template, such as enable_thinking.

        Raises:
            BadItem: There is no template, it refuses the chat, or an argument belongs to the tokenizer.
        """
        chat = Chat(list(messages), [False] * len(messages), arguments=arguments)
        return self.template.ids(self.template.text(chat, asks=add_generation_prompt))

    @property
    def _reader(self) -> ImageReader:
        assert self.images is not None, "records with images are refused without it"
        return self.images

    def _images(self, form: str, value: dict[str, Any]) -> list[Image]:
        """Return the images of a record; write the target's placeholder where its turns name an image.

        Raises:
            BadItem: One cannot be read, or images are not read here or in this form.
        """
        images = images_of(value)
        if not images:
            return []
        if self.images is None:
            raise BadItem(NO_READER)
        if form == "text":
            raise BadItem(f"{IMAGES}: plain text is cut into windows: use prompt and completion, or a chat")
        if is_chat(form, value):
            value[form] = with_placeholders(value[form], self.images.placeholder)
        return images

    def _seen(
        self, tokens: Sequence[int], mask_T: Sequence[bool], images: Sequence[Image]
    ) -> tuple[list[int], list[bool], list[Image]]:
        """Return tokens with those of their images, the mask, and the images."""
        if self.images is None:
            return list(tokens), list(mask_T), []
        return with_images(tokens, mask_T, images, self.images)

    def refuse_lone_image_tokens(self, records: Sequence[Record]) -> None:
        """Refuse records that have tokens of image positions and no images: the target would have nothing to read there.

        Raises:
            BadItem: There is one.
        """
        reader = self.images
        if reader is not None and any(reader.visual_id in one.tokens for one in records if not one.images):
            raise BadItem(f"{IMAGES}: the text has a token of image positions ({reader.placeholder}), and no images")

    def _first(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens up to `max_length`.

        Raises:
            BadItem: An image is beyond it.
        """
        first = list(tokens[: self.max_length])
        if self.images is not None and self.images.visual_id in tokens[self.max_length :]:
            raise BadItem(f"{IMAGES}: an image is beyond the first {self.max_length} tokens (data.max_length)")
        return first

    def _prompt(self, form: str, value: Mapping[str, Any]) -> list[int]:
        """Return all ids of an item, before cutting."""
        if form in TOKENS:
            return token_row(form, value, num_ids=self.size)[0]
        if form == "text":
            return self.raw.begun(text_of(value["text"], "text"))
        if form == "prompt" and not prompt_is_chat(value):
            return self._raw_prompt(value)
        return self.template.prompt(chat_of(form, value, self.reading))

    def _raw_prompt(self, value: Mapping[str, Any]) -> list[int]:
        if unread := [key for key in FOR_TEMPLATE if value.get(key)]:
            raise BadItem(
                f"{unread[0]}: no template reads it beside a 'prompt' of text; use messages, or \"chat\": true"
            )
        text = text_of(value["prompt"], "prompt")
        if self.template.exists and "chat" not in value and not self.raw.has_special(text):
            self.notes[UNTEMPLATED] += 1
        return self.raw.begun(text)

    def _windows(self, text: Any, *, id: str, domain: str) -> list[Record]:
        """Cut a document into records; the last ends with the end-of-text token if the tokenizer has one."""
        tokens = self.raw.begun(text_of(text, "text"))
        end = self.raw.ended(tokens)[len(tokens) :]
        pieces = [(start, tokens[start : start + self.max_length]) for start in range(0, len(tokens), self.max_length)]
        if end:
            start, last = pieces.pop()
            # If the end token does not fit, drop the first token: it has nothing before it and is not a label.
            over = max(0, len(last) + len(end) - self.max_length)
            pieces.append((start + over, [*last, *end][over:]))
        records = [
            Record(f"{id}@{start}", piece, [True] * len(piece), domain=domain)
            for start, piece in pieces
            if len(piece) > 1
        ]
        if not records:
            raise BadItem("text: has one token, which has nothing before it and is not a label")
        return records

    def _completion(self, value: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        key = answer_key("prompt", value)
        if key is None:
            raise BadItem("prompt: has no completion, so nothing is a label")
        before = self._raw_prompt(value)
        after = self.raw.ended(continuation_ids(self.tokenizer, text_of(value[key], key)))
        stop = self.raw.end_of(after) or len(after)
        return before + after, [False] * len(before) + [True] * stop + [False] * (len(after) - stop)


def is_chat(form: str, value: Mapping[str, Any]) -> bool:
    """Return whether a record is read through the chat template."""
    return form not in PLAIN and (form != "prompt" or prompt_is_chat(value))


def _id(value: Mapping[str, Any], default: str) -> str:
    given = value.get("id")
    return unicode_text(default if given is None else str(given), "id")
