"""DFlash: a block of mask tokens is filled in one pass. With `causal`, JetSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from drafttrain.core.settings import setting
from drafttrain.drafters import drafters
from drafttrain.drafters.dflash.drafter import BlockDrafter
from drafttrain.drafters.dflash.settings import BlockSettings


@dataclass
class DFlashSettings(BlockSettings):
    """A block of mask tokens, filled in one pass that reads the target's features as context (DFlash, JetSpec)."""

    draft: Literal["greedy"] = setting(
        "greedy",
        help="At every temperature the chain is the argmax of each slot, and its tokens are FIXED: slots do not know each "
        "other's tokens, so drawing each of them gives incoherent text.",
    )


@drafters.register("dflash", DFlashSettings)
class DFlash(BlockDrafter):
    """Slots are independent given the context: token t + d is predicted without the tokens between.

    Source: DFlash, arXiv 2602.06036. With `causal` (a slot attends to the slots up to its own): JetSpec, arXiv 2606.18394.
    """

    kind = "dflash"
    settings_class = DFlashSettings
    architecture = "DFlashDraftModel"
    serving: ClassVar[str] = "It drafts trees in the embedded evaluator only."
