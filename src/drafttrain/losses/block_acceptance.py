"""Expected length of the accepted block, which block efficiency rewards, not the mean acceptance rate."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import RowIndex
from drafttrain.losses import Loss, losses
from drafttrain.losses.blocks import Blocks


@dataclass
class BlockAcceptanceSettings:
    """Share of a block's draft tokens that is expected to be rejected. A depth after one that is never accepted learns nothing: warm up."""

    block_length: int = setting(5, help="Draft tokens of a block.", ge=1)


@losses.register("block_acceptance", BlockAcceptanceSettings)
class BlockAcceptance(Loss):
    """1 - (1/K) sum_{k<=K} prod_{i<=k} a_i over the K depths of a block, a_i the acceptance rates; the same for all its rows.

    A drafter of depth 1 (a chain) is read in windows of K successive positions; the last window of a text may be shorter.
    A depth that cannot be learned (the drafter's vocabulary lacks the target's likeliest token) is never accepted.
    """

    def __init__(self, settings: BlockAcceptanceSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or BlockAcceptanceSettings()

    @property
    def block_length(self) -> int:
        """Draft tokens of a block."""
        return self.settings.block_length

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the acceptance rate of each row."""
        return {"acceptance": rows.acceptance_N}

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return the expected rejected share of each row's block."""
        acceptance_N = values["acceptance"]
        blocks = Blocks.of(index)
        length_B = blocks.table(torch.ones_like(acceptance_N)).sum(dim=1)
        passed_B = torch.ones_like(acceptance_N)
        accepted_B = torch.zeros_like(acceptance_N)
        # A product with a hole is 0: what follows is never reached.
        for rate_B in blocks.table(acceptance_N).unbind(dim=1):
            passed_B = passed_B * rate_B
            accepted_B = accepted_B + passed_B
        return (1 - accepted_B / length_B.clamp_min(1))[blocks.block_N]
