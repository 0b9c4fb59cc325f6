"""From an item of a source to records: which format it has, its tokens, and which of them are labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.core.records import Record

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

    def records(self, value: Mapping[str, Any], *, id: str) -> list[Record]:
        """Return the records of an item: several for plain text longer than `max_length`.

        Raises:
            BadItem: The item has no known format, or nothing in it is a label.
        """
        id, domain = str(value.get("id", id)), str(value.get("domain", ""))
        if "tokens" in value:
            tokens, mask = self._tokens(value)
        elif "messages" in value or "conversations" in value:
            tokens, mask = self._chat(messages_of(value))
        elif "prompt" in value and "completion" in value:
            tokens, mask = self._completion(value)
        elif "text" in value:
            return self._windows(self.text(value["text"]), id=id, domain=domain)
        else:
            raise BadItem(f"none of {FORMATS} is here; keys: {', '.join(map(str, value)) or 'none'}")
        tokens, mask = tokens[: self.max_length], mask[: self.max_length]
        if not any(mask[1:]):
            raise BadItem(f"no token of the first {self.max_length} is a label (an answer of the assistant)")
        return [Record(id, tokens, mask, domain=domain)]

    def prompts(self, value: Mapping[str, Any], *, id: str, prompt_tokens: int | None) -> list[tuple[str, list[int]]]:
        """Return (id, tokens) of the prompts of an item: chats up to the last answer, text in pieces."""
        id = str(value.get("id", id))
        if "messages" in value or "conversations" in value:
            return [(id, self._chat_prompt(messages_of(value)))]
        if "prompt" in value:
            messages = value["prompt"] if isinstance(value["prompt"], list) else None
            if messages is None and self.tokenizer.chat_template and value.get("chat", True):
                messages = [{"role": "user", "content": _text(value["prompt"], "prompt")}]
            return [(id, self._chat_prompt(messages) if messages else self.text(value["prompt"]))]
        if "text" not in value and "tokens" not in value:
            raise BadItem(
                f"no prompt: none of messages, conversations, prompt, text or tokens; keys: {', '.join(map(str, value))}"
            )
        tokens = list(value["tokens"]) if "tokens" in value else self.text(value["text"])
        if prompt_tokens is None:
            return [(id, tokens)]
        pieces = [tokens[start : start + prompt_tokens] for start in range(0, len(tokens), prompt_tokens)]
        return [(f"{id}@{i * prompt_tokens}", piece) for i, piece in enumerate(pieces) if len(piece) == prompt_tokens]

    def text(self, text: Any) -> list[int]:
        """Return the ids of plain text, with what the tokenizer puts in front."""
        return list(self.tokenizer(_text(text, "text")).input_ids)

    def _windows(self, tokens: Sequence[int], *, id: str, domain: str) -> list[Record]:
        """Cut a document, its end marked where the tokenizer has a token for that."""
        if not tokens:
            raise BadItem("text: is empty")
        end = self.tokenizer.eos_token_id
        whole = [*tokens, *([end] if end is not None else [])]
        pieces = [whole[start : start + self.max_length] for start in range(0, len(whole), self.max_length)]
        return [
            Record(f"{id}@{i * self.max_length}", piece, [True] * len(piece), domain=domain)
            for i, piece in enumerate(pieces)
            if len(piece) > 1
        ]

    def _tokens(self, value: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        tokens = value["tokens"]
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise BadItem("tokens: a list of whole numbers is needed")
        size = max(self.tokenizer.get_vocab().values()) + 1
        if outside := [token for token in tokens if not 0 <= token < size]:
            raise BadItem(f"tokens: {outside[0]} is no id of the tokenizer (0..{size - 1})")
        mask = value.get("loss_mask", [True] * len(tokens))
        if not isinstance(mask, list) or len(mask) != len(tokens):
            raise BadItem(f"loss_mask: a list of {len(tokens)} truth values is needed")
        return list(tokens), [bool(flag) for flag in mask]

    def _completion(self, value: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        prompt, answer = value["prompt"], value["completion"]
        if isinstance(prompt, list) or isinstance(answer, list):
            return self._chat([*_messages(prompt, "prompt"), *_messages(answer, "completion")])
        before = self.text(prompt)
        after = list(self.tokenizer(_text(answer, "completion"), add_special_tokens=False).input_ids)
        if self.tokenizer.eos_token_id is not None:
            after.append(self.tokenizer.eos_token_id)
        return before + after, [False] * len(before) + [True] * len(after)

    def _chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Return ids and the assistant's mask.

        By the template's own generation marks where it has them, else turn by turn: what a message adds to the text before it.
        """
        self._needs_template()
        if "{% generation" in self.tokenizer.chat_template or "{%- generation" in self.tokenizer.chat_template:
            coded = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = coded["assistant_masks"]
            return list(coded["input_ids"]), [bool(flag) for flag in mask]
        tokens: list[int] = []
        mask_T: list[bool] = []
        for count, message in enumerate(messages, start=1):
            until = self._ids(messages[:count])
            if message["role"] == "assistant":
                before = self._ids(messages[: count - 1], add_generation_prompt=True)
                if until[: len(before)] != before:
                    raise BadItem(
                        "the chat template rewrites earlier turns: the assistant's tokens cannot be told apart"
                    )
                tokens, mask_T = before, mask_T + [False] * (len(before) - len(mask_T))
            elif until[: len(tokens)] != tokens:
                raise BadItem("the chat template rewrites earlier turns: the assistant's tokens cannot be told apart")
            is_label = message["role"] == "assistant"
            mask_T, tokens = mask_T + [is_label] * (len(until) - len(tokens)), until
        return tokens, mask_T

    def _chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        self._needs_template()
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadItem("no message before the assistant's")
        return self._ids(messages, add_generation_prompt=True)

    def _ids(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> list[int]:
        if not messages and not add_generation_prompt:
            return []
        coded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
        )
        return list(coded["input_ids"])

    def _needs_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise BadItem("a chat, but the tokenizer has no chat template: give prompt and completion, or text")


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
        if role not in ROLES:
            raise BadItem(f"{key}.{number}: unknown role {role!r}. Known: {', '.join(ROLES)}")
        found.append({"role": ROLES[role], "content": _text(content, f"{key}.{number}.content")})
    return found


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadItem(
            f"{key}: text is needed, got {type(value).__name__ if not isinstance(value, str) else 'an empty one'}"
        )
    return value
