"""The target's output rows in a smaller width: the start of a drafter's tied embedding.

V = vocabulary, D = the target's width, W = the drafter's width
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError


def projected(rows_VD: Tensor, width: int) -> Tensor:
    """Return rows_VW, the rows' coordinates along their strongest singular directions.

    The best approximation of this rank: products of two projected rows are nearest to those of the rows themselves.

    Raises:
        CheckpointError: The rows are narrower.
    """
    if width > rows_VD.shape[1]:
        raise CheckpointError(
            f"drafter.hidden_size must be 1..{rows_VD.shape[1]}, the target's width, with embedding_init: target, got {width}"
        )
    wide_VD = rows_VD.detach().float()
    directions_DW = torch.linalg.eigh((wide_VD.T @ wide_VD).double()).eigenvectors.flip(-1)[:, :width]
    # An eigenvector has no sign of its own: the largest coordinate is made positive, so that all machines start alike.
    largest_W = directions_DW.gather(0, directions_DW.abs().argmax(dim=0, keepdim=True))[0]
    return wide_VD @ (directions_DW * largest_W.sign()).float()
