"""The only place that shifts: which row of a drafter speaks of which token.

B = sequences, T = positions, D = hidden, K = depths, N = rows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.records import DraftBatch, DraftOutput, RowIndex


@dataclass(frozen=True)
class AlignedRows:
    """The N trained rows of a batch, depth by depth: where the drafter, the target and the label of each are."""

    drafter_N: Tensor
    """Flat position b * T + t of the drafter's state."""
    target_N: Tensor
    """Flat position of the target's state whose law is over the same token."""
    tokens_N: Tensor
    """The label."""
    seed_N: Tensor
    """A number of the row that does not depend on its micro-batch."""
    index: RowIndex
    counts: Mapping[int, int]
    """Rows of each depth of the drafter, in their order."""
    targets_on_host: Tensor
    """`target_N` on the CPU, wherever the batch is: pieces are cut by it without asking the device."""


def align(drafted: DraftOutput, batch: DraftBatch, *, block_length: int = 1) -> AlignedRows:
    """Return the rows of all depths whose label is trained.

    Row t of depth d is the law of token t + d + lag, in the same document; the target says its own law of that token at
    t + d + lag - 1. `loss_mask_BT` is read at the label.

    Args:
        block_length: Rows of a drafter of depth 1 that form one block.
    """
    depths = sorted(drafted.states_BTD)
    parts = [_of_depth(batch, depth, depth + drafted.lag) for depth in depths]
    drafter_N, label_N, depth_N = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    sequence_N = batch.documents_BT.flatten()[label_N]
    position_N = batch.positions_BT.flatten()[label_N]
    seed_N = (batch.step * 1_000_003 + sequence_N) * (1 << 26) + position_N * 64 + depth_N
    # One block: the depths of one root, or a window of successive positions of a chain.
    root_N = position_N - depth_N
    if len(depths) == 1:
        root_N, depth_N = position_N // block_length, position_N % block_length + 1
    return AlignedRows(
        drafter_N=drafter_N,
        target_N=label_N - 1,
        tokens_N=batch.tokens_BT.flatten()[label_N],
        seed_N=seed_N,
        index=RowIndex(
            sequence_N=sequence_N,
            depth_N=depth_N,
            block_N=sequence_N * (1 << 32) + root_N,
            step=batch.step,
            deepest=max(depths) if len(depths) > 1 else block_length,
        ),
        counts={depth: len(part[0]) for depth, part in zip(depths, parts, strict=True)},
        targets_on_host=(label_N - 1).cpu(),
    )


def _of_depth(batch: DraftBatch, depth: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (flat drafter position, flat label position, depth) of one depth's trained rows."""
    length = batch.tokens_BT.shape[1]
    documents_BT = batch.documents_BT
    same_BT = documents_BT[:, shift:] == documents_BT[:, : max(length - shift, 0)]
    trained_BT = batch.loss_mask_BT[:, shift:] & same_BT & (documents_BT[:, shift:] >= 0)
    row_N, column_N = trained_BT.nonzero(as_tuple=True)
    drafter_N = row_N * length + column_N
    return drafter_N, drafter_N + shift, torch.full_like(row_N, depth)
