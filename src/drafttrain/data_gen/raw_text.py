"""Text that the target reads as it is: the special tokens that a tokenizer puts around it are added only where missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from drafttrain.data_gen.chat_template import ChatTemplate, special_ids, written
from drafttrain.data_gen.plain_ids import begins, plain_ids


@dataclass(frozen=True)
class RawText:
    """Reads text by one tokenizer; a text may be a chat that was rendered before."""

    tokenizer: Any
    template: ChatTemplate

    def begun(self, text: str) -> list[int]:
        """Return the ids of text, with what the tokenizer puts in front where the text has none of it."""
        tokens = plain_ids(self.tokenizer, text)
        front, _ = self._around
        if begins(tokens, front) or self._is_rendered(tokens):
            return tokens
        return [*front, *tokens]

    def ended(self, tokens: Sequence[int]) -> list[int]:
        """Return ids with the end of text behind them, where they have no end yet."""
        return list(tokens) if self.end_of(tokens) else [*tokens, *self._end]

    def end_of(self, tokens: Sequence[int]) -> int:
        """Return how many tokens there are up to their end of text, behind which only white space may be; 0: they have none."""
        place = written(self.tokenizer, tokens)
        ends = {*self._end, self.template.end} - {None}
        return place if place and tokens[place - 1] in ends else 0

    def _is_rendered(self, tokens: Sequence[int]) -> bool:
        """Return whether text begins as the chat template begins one, which then says what stands in front."""
        first = self.template.around[0][:1]
        return bool(first) and first[0] in special_ids(self.tokenizer) and list(tokens[:1]) == first

    def has_special(self, text: str) -> bool:
        """Return whether text spells a special token, as a chat does that was rendered before."""
        return not special_ids(self.tokenizer).isdisjoint(plain_ids(self.tokenizer, text))

    @property
    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [end] if end is not None else self._around[1]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after every text."""
        bare, whole = plain_ids(self.tokenizer, "a"), list(self.tokenizer("a").input_ids)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []
