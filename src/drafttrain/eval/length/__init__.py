"""Length policies, one file each: how many tokens to draft, and when to stop drafting."""

from drafttrain.core.registry import Registry

length_policies = Registry("length policy", "drafttrain.eval.length")


class LengthSettings:
    """What the settings of every length policy offer."""

    @property
    def chain_length(self) -> int:
        """Successive draft tokens of a round, where one number is needed: estimates by replay, exported configurations.

        The default stands for policies whose rounds differ.
        """
        return 5
