"""The text of tokens while they arrive, round by round, with who chose each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from drafttrain.core.generations import Round
from drafttrain.core.proposals import Context
from drafttrain.eval.result import Piece

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Decoded from the first bytes of a character whose other bytes are in the next tokens."""


class AnswerText:
    """Text that grows by tokens. A character that spans tokens is returned with the token that completes it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self.text = ""
        """What was returned so far. Special tokens have no text."""

    def of_round(self, context: Context, round: Round) -> Iterator[Piece]:
        """Yield the text of a round: that of its accepted draft tokens, then that of the target's own token."""
        emitted = context.tokens[context.num_prompt_tokens + round.start :]
        for tokens, drafted in ((emitted[: round.num_accepted], True), (emitted[round.num_accepted :], False)):
            if text := self.add(tokens):
                yield Piece(text, drafted)

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        self._tokens.extend(tokens)
        return self._new(self._decoded().rstrip(INCOMPLETE))

    def rest(self) -> str:
        """Return what is left at the end: bytes that are no character."""
        return self._new(self._decoded())

    def _new(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
