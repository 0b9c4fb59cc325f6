"""Early exit without training: the first blocks of any target, its final norm and its head draft for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from drafttrain.core.settings import setting
from drafttrain.drafters.early_exit.proposer import EarlyExitProposer
from drafttrain.eval.proposers import Surroundings, proposers


@dataclass
class OwnBlocksSettings:
    """Settings that all proposers with the target's first blocks share."""

    nodes_come_first: ClassVar[bool] = True
    in_target: ClassVar[bool] = True
    chains_only: ClassVar[bool] = True

    model: Literal["target", "drafter"] = setting(
        "target",
        help="Whose blocks: the given target's; or those of the target that the drafter has tuned, which then verifies too.",
    )
    draft: Literal["sampled", "greedy"] = setting(
        "sampled", help="At temperature > 0: draft by sampling, or by argmax (then nodes are FIXED)."
    )

    @property
    def reads_drafter(self) -> bool:
        """It decodes with the target of the drafter that is evaluated."""
        return self.model == "drafter"


@dataclass
class EarlyExitProposerSettings(OwnBlocksSettings):
    """The target's first blocks, its final norm and its head."""

    exit_layer: int = setting(2, help="Target blocks that draft: from 1 to one less than the target has.", ge=1)


@proposers.register("early_exit", EarlyExitProposerSettings)
class EarlyExit(EarlyExitProposer):
    """Exits after a fixed number of blocks.

    Source: Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710.
    """

    @classmethod
    def create(cls, settings: EarlyExitProposerSettings, surroundings: Surroundings) -> EarlyExit:
        """Return the proposer for this target."""
        return cls(
            surroundings.target,
            exit_layer=settings.exit_layer,
            draft=settings.draft,
            listener=surroundings.listener,
        )
