"""Length policies, one file each: how many tokens to draft, and when to stop drafting."""

from typing import ClassVar

from drafttrain.core.proposals import DraftStep, Verdict
from drafttrain.core.registry import Registry

length_policies = Registry("length policy", "drafttrain.eval.length")


class LengthSettings:
    """Base class of the settings of all length policies."""

    reads_confidence: ClassVar[bool] = False
    """The policy reads `DraftStep.confidence`, which only drafters with a confidence head predict."""

    @property
    def chain_length(self) -> int:
        """Consecutive draft tokens of a round, for estimates by replay and for exported configurations.

        The default is for policies whose rounds differ in length.
        """
        return 5

    @property
    def most_children(self) -> int:
        """Most children of a node: more than 1 is a tree, which some drafters do not draft."""
        return 1


class TreeSizeSettings(LengthSettings):
    """Base class of settings with a number of nodes, a depth and a width."""

    num_draft_tokens: int
    depth: int
    width: int

    @property
    def chain_length(self) -> int:
        """The levels of the tree."""
        return self.depth

    @property
    def most_children(self) -> int:
        """The width."""
        return self.width

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.depth > self.num_draft_tokens:
            return [f"depth: must be at most num_draft_tokens ({self.num_draft_tokens}), got {self.depth}"]
        return []


class WholeBudget:
    """A policy that never stops before its budget is spent."""

    def more(self, step: DraftStep) -> bool:
        """Return True."""
        return True

    def observe(self, verdict: Verdict) -> None:
        """Do nothing."""
