"""What the tokens of a tokenizer spell, which of them control the text, and what it puts before a text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from drafttrain.target_model.token_bytes import control_ids, is_lone_byte, token_bytes

WORDS = re.compile(rb"[A-Za-z] [A-Za-z]")
"""The end of a word and the beginning of the next."""


class Spelling:
    """What is known of one tokenizer of two.

    Raises:
        CheckpointError: What its tokens spell is not known (`token_bytes`).
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self.tokenizer = tokenizer
        self._bytes = token_bytes(tokenizer, name=name)
        names = {id: token for token, id in tokenizer.get_vocab().items()}
        self.control = {names[id]: id for id in sorted(control_ids(tokenizer)) if id in names}
        """Ids of the special tokens by name."""
        self._names = names
        bare, whole = (list(tokenizer("a", add_special_tokens=add).input_ids) for add in (False, True))
        begin = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self.starts = whole[:begin]
        """What it puts before every text."""
        self.puts_space = bool(bare) and self.spells(bare[0]).startswith(b" ")
        """It puts a space before every text."""

    @cached_property
    def joins_words(self) -> bool:
        """It may not split a text between a letter and a space before a letter: a token has both, or a text of two words shows it."""
        alone = [*self.encode("ab"), *self.encode("cd" if self.puts_space else " cd")]
        return self.encode("ab cd") != alone or any(WORDS.search(spelled) for spelled in self._bytes.values())

    def spells(self, id: int) -> bytes:
        """Return the bytes of a token; the name of a special one; nothing for an id without a token."""
        return self._bytes.get(id, self._names.get(id, "").encode())

    def pieces(self, ids: Sequence[int], *, begins: bool) -> list[bytes]:
        """Return the bytes of each token of a text.

        Args:
            begins: These are the first tokens of the text: the space that the tokenizer puts before it is left out.
        """
        pieces = [self.spells(one) for one in ids]
        if begins and self.puts_space and pieces and pieces[0].startswith(b" "):
            pieces[0] = pieces[0][1:]
        return pieces

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without those that are put before every text."""
        # Faster than the tokenizer's call, which was made above: no truncation is left in it.
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def by_bytes(self) -> dict[bytes, list[int]]:
        """Return the ids of the tokens that spell the same; lone bytes of SentencePiece last."""
        found: dict[bytes, list[int]] = defaultdict(list)
        for id in sorted(self._bytes, key=lambda id: (is_lone_byte(self._names[id]), id)):
            found[self._bytes[id]].append(id)
        found.pop(b"", None)
        return found
