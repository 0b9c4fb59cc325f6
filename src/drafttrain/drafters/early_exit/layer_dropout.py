"""Layer dropout: some documents of a batch skip some blocks of the target.

B = sequences, T = positions, L = blocks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.losses.random_rows import uniform
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.block_range import replaced_forwards
from drafttrain.target_model.documents import as_read

OWN_STREAM = 1 << 25
"""Added to a document's seed: no position has it, so that other draws by document and position are independent."""


def dropped_blocks(model: Any, batch: DraftBatch, rates: Sequence[float]) -> AbstractContextManager[None]:
    """Within this context, documents skip blocks: what enters a block is what leaves it.

    Every document is computed in every block, so this costs as much as no dropout.

    Args:
        rates: The chance of each block to be skipped.
    """
    seed_BT = batch.seed_BT - batch.positions_BT + OWN_STREAM
    as_read_BT = as_read(model, seed_BT, batch.positions_BT)
    uniform_BTL = uniform(as_read_BT.flatten(), len(rates)).unflatten(0, as_read_BT.shape)
    stack = blocks(model)
    return replaced_forwards(
        {
            stack[number]: _skipping(stack[number].forward, uniform_BTL[..., number, None] < rate)
            for number, rate in enumerate(rates)
            if rate
        }
    )


def _skipping(forward: Callable[..., Tensor], dropped_BT1: Tensor) -> Callable[..., Tensor]:
    def skipping(hidden_states: Tensor, *others: Any, **more: Any) -> Tensor:
        return torch.where(dropped_BT1.to(hidden_states.device), hidden_states, forward(hidden_states, *others, **more))

    return skipping
