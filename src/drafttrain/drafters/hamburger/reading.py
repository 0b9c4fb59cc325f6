"""Texts read in segments: every position as the merged beginning of its segment, in one call of the target.

B = sequences, T = positions, N = slots of all sequences, S = most tokens of a segment, D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.linear_head import no_autocast_if_frozen
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters.hamburger.embedder import SegmentEmbedder, look_back
from drafttrain.target_model.anatomy import taps, trunk


@dataclass(frozen=True)
class InSegments:
    """What the target computes at every position from (complete segments before it, its own segment so far, merged)."""

    final_BTD: Tensor
    hidden_BTD: Mapping[int, Tensor]
    embedded_BTD: Tensor
    """The embeddings of the tokens, not merged."""


def places_of(joins_N: Tensor, size: int) -> Tensor:
    """Return place_N: how many tokens of its segment are before each token.

    Args:
        joins_N: Whether each token joins the one before it.
    """
    joins_NS = look_back(joins_N.long(), size)[:, : size - 1]
    return joins_NS.cumprod(dim=1).sum(dim=1)


def read_in_segments(
    model: Any,
    embedder: SegmentEmbedder,
    tokens_BT: Tensor,
    positions_BT: Tensor,
    joins_BT: Tensor,
    *,
    hidden: tuple[int, ...],
) -> InSegments:
    """Return the states of every position.

    Position t is read as the merged tokens of its segment up to t, at the place of token t. It attends to itself and to the last
    position of every earlier segment of its document: the only entries that decoding has in its cache.

    Args:
        positions_BT: They restart at 0 with each document.
        joins_BT: Whether each token joins the segment of the one before it.
    """
    embedded_BTD = model.get_input_embeddings()(tokens_BT)
    back_NSD = look_back(embedded_BTD.flatten(0, 1), embedder.size)
    entering_ND = embedder(back_NSD, places_of(joins_BT.flatten(), embedder.size))
    with no_autocast_if_frozen(model.get_output_embeddings().weight), taps(model, TargetNeeds(hidden=hidden)) as seen:
        final_BTD = trunk(model)(
            inputs_embeds=entering_ND.to(model.dtype).unflatten(0, tokens_BT.shape),
            position_ids=positions_BT,
            attention_mask=_mask(positions_BT, joins_BT, dtype=model.dtype),
            use_cache=False,
        ).last_hidden_state
    return InSegments(final_BTD, {int(index): states for index, states in seen.items()}, embedded_BTD)


def _mask(positions_BT: Tensor, joins_BT: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the additive mask_B1TT."""
    number_BT = (positions_BT == 0).cumsum(dim=1)
    before_BTT = (number_BT[:, :, None] == number_BT[:, None]).tril()
    last_BT = torch.cat([~joins_BT[:, 1:], joins_BT.new_ones(len(joins_BT), 1)], dim=1)
    own_TT = torch.eye(joins_BT.shape[1], dtype=torch.bool, device=joins_BT.device)
    allowed_BTT = before_BTT & (last_BT[:, None] | own_TT)
    mask_BTT = torch.zeros(allowed_BTT.shape, dtype=dtype, device=allowed_BTT.device)
    return mask_BTT.masked_fill_(~allowed_BTT, torch.finfo(dtype).min)[:, None]
