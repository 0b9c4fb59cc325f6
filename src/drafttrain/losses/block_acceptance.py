"""Expected length of the accepted block: what block efficiency rewards, not the mean acceptance rate."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.records import LossRows, RowIndex
from drafttrain.core.settings import setting
from drafttrain.losses import Loss, losses


@dataclass
class BlockAcceptanceConfig:
    """Draft tokens of a block that are expected to be lost. A depth after one that is never accepted learns nothing: warm up."""

    block_length: int = setting(5, help="Draft tokens of a block.", ge=1)


@losses.register("block_acceptance", BlockAcceptanceConfig)
class BlockAcceptance(Loss):
    """1 - (1/K) sum_{k<=K} prod_{i<=k} a_i over the K depths of a block, a_i the acceptance rates; the same for all its rows.

    A drafter of depth 1 (a chain) is read in windows of K successive positions; a window that the text's end cuts is shorter.
    A depth that is left out between others (the drafter's vocabulary lacks what the target would say) is never accepted.
    """

    def __init__(self, settings: BlockAcceptanceConfig | None = None) -> None:
        super().__init__()
        self.block_length = (settings or BlockAcceptanceConfig()).block_length

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return the acceptance rate of each row."""
        return {"acceptance": rows.acceptance_N}

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return, for each row, the lost share of its block."""
        acceptance_N = values["acceptance"]
        _, block_N, length_B = torch.unique(index.block_N, return_inverse=True, return_counts=True)
        order_N = torch.argsort(block_N * (int(index.depth_N.max()) + 1) + index.depth_N, stable=True)
        starts_B = length_B.cumsum(0) - length_B
        depth_N = index.depth_N[order_N]
        column_N = depth_N - depth_N[starts_B].repeat_interleave(length_B)
        # A missing depth has chance 0, so that no product passes it.
        rate_BK = acceptance_N.new_zeros(len(length_B), int(column_N.max()) + 1)
        rate_BK = rate_BK.index_put((block_N[order_N], column_N), acceptance_N[order_N])
        kept_B = rate_BK.cumprod(dim=1).sum(dim=1)
        return (1 - kept_B / length_B)[block_N]
