"""Expected length of the accepted block, which block efficiency rewards, not the mean acceptance rate."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import RowIndex
from drafttrain.losses import Loss, losses
from drafttrain.losses.groups import groups

_BEYOND = 1 << 40
"""Larger than any depth."""


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
        counted_N = torch.ones_like(acceptance_N)
        if index.learnable_N is not None:
            counted_N = index.learnable_N.to(acceptance_N.dtype)
        block_N = groups(index.block_N)
        length_B = torch.zeros_like(acceptance_N).index_add(0, block_N, counted_N)
        # Columns count from the first depth that can be learned. A missing depth has acceptance rate 0, so every product with it is 0.
        depth_N = torch.where(counted_N > 0, index.depth_N, _BEYOND)
        first_B = torch.full_like(depth_N, _BEYOND).scatter_reduce(0, block_N, depth_N, "amin")
        column_N = (index.depth_N - first_B[block_N]).clamp_min(0)
        columns = index.deepest or int(index.depth_N.max())
        rate_S = acceptance_N.new_zeros(len(acceptance_N) * columns)
        rate_S = rate_S.index_add(0, block_N * columns + column_N, acceptance_N * counted_N)
        passed_B = torch.ones_like(acceptance_N)
        kept_B = torch.zeros_like(acceptance_N)
        for rate_B in rate_S.view(-1, columns).unbind(dim=1):
            passed_B = passed_B * rate_B
            kept_B = kept_B + passed_B
        return (1 - kept_B / length_B.clamp_min(1))[block_N]
