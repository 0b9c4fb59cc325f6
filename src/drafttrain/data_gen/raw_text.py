"""Text that the target reads without a template: the tokenizer's special tokens are added only where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from drafttrain.data_gen.chat_template import ChatTemplate, special_ids, written
from drafttrain.data_gen.plain_ids import begins, plain_ids


@dataclass(frozen=True)
class RawText:
    """Encodes text; a text may be a chat that was rendered before."""

    tokenizer: Any
    template: ChatTemplate

    def begun(self, text: str) -> list[int]:
        """Return the ids of text, with the tokenizer's start tokens unless the text has them."""
        tokens = plain_ids(self.tokenizer, text)
        front, _ = self._around
        if begins(tokens, front) or self._is_rendered(tokens):
            return tokens
        return [*front, *tokens]

    def ended(self, tokens: Sequence[int]) -> list[int]:
        """Return ids with the end of text appended, unless they have one."""
        return list(tokens) if self.end_of(tokens) else [*tokens, *self._end]

    def end_of(self, tokens: Sequence[int]) -> int:
        """Return the number of tokens up to the end of text, after which only white space may follow; 0: there is no end."""
        place = written(self.tokenizer, tokens)
        ends = {*self._end, self.template.end} - {None}
        return place if place and tokens[place - 1] in ends else 0

    def _is_rendered(self, tokens: Sequence[int]) -> bool:
        """Return whether text begins with the chat template's first token: a rendered chat has its start tokens already."""
        first = self.template.around[0][:1]
        return bool(first) and first[0] in special_ids(self.tokenizer) and list(tokens[:1]) == first

    def has_special(self, text: str) -> bool:
        """Return whether text holds a special token, as a rendered chat does."""
        return not special_ids(self.tokenizer).isdisjoint(plain_ids(self.tokenizer, text))

    @property
    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [end] if end is not None else self._around[1]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after every text."""
        bare, whole = plain_ids(self.tokenizer, "a"), list(self.tokenizer("a").input_ids)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []
