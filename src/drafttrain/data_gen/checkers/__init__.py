"""Checkers, one file a kind: they read the answer of a text, to test whether changing a token changes it."""

from collections.abc import Hashable
from typing import Protocol

from drafttrain.core.registry import Registry

checkers = Registry("checker", "drafttrain.data_gen.checkers")


class Checker(Protocol):
    """Reads the answer from the text that was generated after a prompt."""

    def answer(self, text: str, *, id: str) -> Hashable | None:
        """Return the answer of a text to the problem of this id; None: there is none that can be checked."""
        ...

    def correct(self, text: str, reference: str, *, id: str) -> bool:
        """Return whether a text solves its problem.

        Args:
            reference: The right answer that came with the prompt; empty where the checker needs none.
        """
        ...
