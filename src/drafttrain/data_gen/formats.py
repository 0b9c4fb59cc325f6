"""From an item of a source to records: which format it has, its tokens, and which of them are labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from drafttrain.core.records import Record
from drafttrain.target.frozen import num_ids

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
FORMATS = "messages, conversations, prompt and completion, text, or tokens"


class BadItem(Exception):
    """Why an item gives no record; it is put into quarantine."""


@dataclass(frozen=True)
class Encoder:
    """Turns items into token ids by one tokenizer."""

    tokenizer: Any
    max_length: int

    @cached_property
    def size(self) -> int:
        """Ids of the tokenizer, from 0."""
        return num_ids(self.tokenizer)

    def records(self, value: Mapping[str, Any], *, id: str) -> list[Record]:
        """Return the records of an item: several for plain text longer than `max_length`.

        Raises:
            BadItem: The item has no known format, or nothing in it is a label.
        """
        id, domain = _id(value, id), str(value.get("domain", ""))
        if "tokens" in value:
            parts = [self._tokens(value)]
        elif "messages" in value or "conversations" in value:
            parts = self._chat(messages_of(value))
        elif "prompt" in value and "completion" in value:
            parts = self._completion(value)
        elif "text" in value:
            return self._windows(self.text(value["text"]), id=id, domain=domain)
        else:
            raise BadItem(f"none of {FORMATS} is here; keys: {', '.join(map(str, value)) or 'none'}")
        records = [
            Record(id if len(parts) == 1 else f"{id}@{i}", tokens[: self.max_length], mask, domain=domain)
            for i, (tokens, whole_mask) in enumerate(parts)
            for mask in [whole_mask[: self.max_length]]
            if any(mask[1:])
        ]
        if not records:
            raise BadItem(f"no token of the first {self.max_length} is a label (an answer of the assistant)")
        return records

    def prompts(self, value: Mapping[str, Any], *, id: str, prompt_tokens: int | None) -> list[tuple[str, list[int]]]:
        """Return (id, tokens) of the prompts of an item: chats up to the last answer, text in pieces.

        Raises:
            BadItem: The item has no known format, or gives no prompt that leaves room for an answer within `max_length`.
        """
        id = _id(value, id)
        tokens = self._prompt(value)
        prompts = [(id, tokens)]
        if prompt_tokens is not None and _is_plain(value):
            pieces = [tokens[start : start + prompt_tokens] for start in range(0, len(tokens), prompt_tokens)]
            prompts = [(f"{id}@{i * prompt_tokens}", p) for i, p in enumerate(pieces) if len(p) == prompt_tokens]
            if not prompts:
                raise BadItem(f"{len(tokens)} tokens, fewer than the {prompt_tokens} of a prompt")
        fitting = [(id, tokens) for id, tokens in prompts if 0 < len(tokens) < self.max_length]
        if not fitting:
            raise BadItem(f"a prompt of {len(prompts[0][1])} tokens; it must have 1..{self.max_length - 1}")
        return fitting

    def _prompt(self, value: Mapping[str, Any]) -> list[int]:
        """Return the ids of an item before anything is cut."""
        if "messages" in value or "conversations" in value:
            return self._chat_prompt(messages_of(value))
        if "prompt" in value:
            messages = _messages(value["prompt"], "prompt") if isinstance(value["prompt"], list) else None
            if messages is None and self.tokenizer.chat_template and value.get("chat", True):
                messages = [{"role": "user", "content": _text(value["prompt"], "prompt")}]
            return self._chat_prompt(messages) if messages else self.text(value["prompt"])
        if not _is_plain(value):
            raise BadItem(
                f"no prompt: none of messages, conversations, prompt, text or tokens; keys: {', '.join(map(str, value))}"
            )
        return self._tokens(value)[0] if "tokens" in value else self.text(value["text"])

    def frame(self) -> tuple[list[int], list[int]]:
        """Return what the chat template puts before and after every prompt; nothing where there is no template."""
        if not self.tokenizer.chat_template:
            return [], []
        try:
            one, other = (self._chat_prompt([{"role": "user", "content": text}]) for text in ("a", "Z"))
        except BadItem:
            return [], []
        before, after = common_start(one, other), common_start(one[::-1], other[::-1])
        return one[:before], one[len(one) - after :]

    def text(self, text: Any) -> list[int]:
        """Return the ids of plain text, with what the tokenizer puts in front."""
        return list(self.tokenizer(_text(text, "text")).input_ids)

    def _windows(self, tokens: Sequence[int], *, id: str, domain: str) -> list[Record]:
        """Cut a document, its end marked where the tokenizer has a token for that."""
        if not tokens:
            raise BadItem("text: is empty")
        pieces = [
            (start, list(tokens[start : start + self.max_length])) for start in range(0, len(tokens), self.max_length)
        ]
        if self.tokenizer.eos_token_id is not None:
            start, last = pieces.pop()
            ended = [*last, self.tokenizer.eos_token_id]
            # Where the end is one token too many, the first one makes room: it has nothing before it and is no label.
            over = max(0, len(ended) - self.max_length)
            pieces.append((start + over, ended[over:]))
        records = [
            Record(f"{id}@{start}", piece, [True] * len(piece), domain=domain)
            for start, piece in pieces
            if len(piece) > 1
        ]
        if not records:
            raise BadItem("text: is one token, which has nothing before it and is no label")
        return records

    def _tokens(self, value: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        tokens = value["tokens"]
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise BadItem("tokens: a list of whole numbers is needed")
        if outside := [token for token in tokens if not 0 <= token < self.size]:
            raise BadItem(f"tokens: {outside[0]} is no id of the tokenizer (0..{self.size - 1})")
        mask = value.get("loss_mask", [True] * len(tokens))
        if not isinstance(mask, list) or len(mask) != len(tokens):
            raise BadItem(f"loss_mask: a list of {len(tokens)} truth values is needed")
        return list(tokens), [bool(flag) for flag in mask]

    def _completion(self, value: Mapping[str, Any]) -> list[tuple[list[int], list[bool]]]:
        prompt, answer = value["prompt"], value["completion"]
        if isinstance(prompt, list) or isinstance(answer, list):
            return self._chat([*_messages(prompt, "prompt"), *_messages(answer, "completion")])
        before = self.text(prompt)
        after = list(self.tokenizer(_text(answer, "completion"), add_special_tokens=False).input_ids)
        if self.tokenizer.eos_token_id is not None:
            after.append(self.tokenizer.eos_token_id)
        return [(before + after, [False] * len(before) + [True] * len(after))]

    def _chat(self, messages: list[dict[str, str]]) -> list[tuple[list[int], list[bool]]]:
        """Return ids and the assistant's mask: of the whole chat, or of parts of it.

        By the template's own generation marks where it has them, else answer by answer: what an answer adds to the text before it.
        A template that rewrites earlier turns (Qwen3 drops their thoughts) divides the chat: an answer whose context is not
        the text so far begins a part of its own, the chat up to this answer as the target would read it, with one label.
        """
        self._needs_template()
        if "{% generation" in self.tokenizer.chat_template or "{%- generation" in self.tokenizer.chat_template:
            coded = self._rendered(messages, return_assistant_tokens_mask=True)
            return [(list(coded["input_ids"]), [bool(flag) for flag in coded["assistant_masks"]])]
        parts: list[tuple[list[int], list[bool]]] = []
        for count, message in enumerate(messages):
            # An answer that opens the chat answers nothing: it is read, and no label.
            if message["role"] != "assistant" or count == 0:
                continue
            before = self._ids(messages[:count], add_generation_prompt=True)
            until = self._ids(messages[: count + 1])
            if until[: len(before)] != before:
                raise BadItem(
                    "the chat template writes an answer otherwise than it asks for one: the assistant's tokens cannot be told apart"
                )
            mask_T = parts.pop()[1] if parts and _begins(before, parts[-1][0]) else []
            mask_T = mask_T + [False] * (len(before) - len(mask_T)) + [True] * (len(until) - len(before))
            parts.append((until, mask_T))
        whole = self._ids(messages)
        if parts and _begins(whole, parts[-1][0]):
            _, mask_T = parts.pop()
            parts.append((whole, mask_T + [False] * (len(whole) - len(mask_T))))
        return parts

    def _chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        self._needs_template()
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadItem("no message before the assistant's")
        return self._ids(messages, add_generation_prompt=True)

    def chat_ids(
        self, messages: list[dict[str, str]], arguments: Mapping[str, Any], *, add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the ids of a chat as the target reads it.

        Args:
            arguments: What the template itself is handed, such as enable_thinking.

        Raises:
            BadItem: There is no template, it refuses the chat, or an argument means something to the tokenizer.
        """
        self._needs_template()
        # A log must not replace the template, nor ask for tensors.
        if reserved := set(arguments) & set(inspect.signature(self.tokenizer.apply_chat_template).parameters):
            raise BadItem(f"{min(reserved)}: is no argument of a chat template")
        return list(self._rendered(messages, add_generation_prompt=add_generation_prompt, **arguments)["input_ids"])

    def _ids(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> list[int]:
        return list(self._rendered(messages, add_generation_prompt=add_generation_prompt)["input_ids"])

    def _rendered(self, messages: list[dict[str, str]], **wanted: Any) -> Mapping[str, Any]:
        """Return what the tokenizer makes of a chat; templates refuse roles and orders that they do not know."""
        try:
            coded: Mapping[str, Any] = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, **wanted
            )
        except jinja2.TemplateError as error:
            raise BadItem(f"the chat template refuses this chat: {error}") from error
        return coded

    def _needs_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise BadItem("a chat, but the tokenizer has no chat template: give prompt and completion, or text")


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts share from their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def messages_of(value: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the turns of a chat in either of its two spellings."""
    if "messages" in value:
        return _messages(value["messages"], "messages")
    return _messages(value["conversations"], "conversations")


def _messages(turns: Any, key: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise BadItem(f"{key}: a list of turns is needed")
    found = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise BadItem(f"{key}.{number}: a mapping with role and content is needed")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadItem(f"{key}.{number}: unknown role {role!r}. Known: {', '.join(ROLES)}")
        found.append({"role": ROLES[role], "content": _text(content, f"{key}.{number}.content")})
    return found


def _id(value: Mapping[str, Any], default: str) -> str:
    given = value.get("id")
    return _unicode(default if given is None else str(given), "id")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadItem(
            f"{key}: text is needed, got {type(value).__name__ if not isinstance(value, str) else 'an empty one'}"
        )
    return _unicode(value, key)


def _unicode(text: str, key: str) -> str:
    """Return text as it is; JSON can spell half a surrogate pair, which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadItem(f"{key}: no Unicode text: half a surrogate pair at character {error.start}") from error
    return text


def _is_plain(value: Mapping[str, Any]) -> bool:
    """Tell whether a prompt is cut from running text."""
    return not {"messages", "conversations", "prompt"} & set(value) and bool({"text", "tokens"} & set(value))


def _begins(tokens: Sequence[int], start: Sequence[int]) -> bool:
    return list(tokens[: len(start)]) == list(start)
