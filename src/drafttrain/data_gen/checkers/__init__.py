"""Checkers, one file a kind: what a text answers, so that a machine can tell whether a change of a token mattered."""

from collections.abc import Hashable
from typing import Protocol

from drafttrain.core.registry import Registry

checkers = Registry("checker", "drafttrain.data_gen.checkers")


class Checker(Protocol):
    """Reads the answer out of what was written after a prompt."""

    def answer(self, text: str, *, id: str) -> Hashable | None:
        """Return what a text answers to the problem of this id; None: nothing that can be checked."""
        ...

    def correct(self, text: str, reference: str, *, id: str) -> bool:
        """Tell whether a text solves its problem.

        Args:
            reference: The right answer that came with the prompt; empty where the checker needs none.
        """
        ...
