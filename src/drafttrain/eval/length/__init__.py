"""Length policies, one file each: how many tokens to draft, and when to stop drafting."""

from typing import ClassVar

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
