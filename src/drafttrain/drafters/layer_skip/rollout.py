"""The states of drafts at every root of packed texts, as decoding computes them.

Tokens before the root have the target's own keys and values, and those from the root on the draft's. So the state after draft
token d - 1 differs by root, and each depth is a pass over all tokens: one attends to the target's columns of tokens before its
root, and to one column of each earlier depth.

T = positions of a row, D = hidden, C = columns
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drafttrain.target_model.anatomy import trunk
from drafttrain.target_model.growing_layer import GrowingCache
from drafttrain.target_model.sublayers import Skipped, Sublayers


@torch.no_grad()
def draft_states(
    sublayers: Sublayers, skipped: Skipped, tokens_BT: Tensor, positions_BT: Tensor, *, num_depths: int
) -> dict[int, Tensor]:
    """Return states_BTD by depth: row t of depth d is the state after the tokens t .. t + d - 1 of a draft with root t.

    Rows are read one at a time: the keys and values of all depths are in memory.

    Args:
        positions_BT: They restart at 0 with each document.
    """
    rows = [
        _row(sublayers, skipped, tokens_1T, positions_1T, num_depths=num_depths)
        for tokens_1T, positions_1T in zip(tokens_BT.split(1), positions_BT.split(1), strict=True)
    ]
    return {depth: torch.cat([row[depth - 1] for row in rows]) for depth in range(1, num_depths + 1)}


def _row(
    sublayers: Sublayers, skipped: Skipped, tokens_1T: Tensor, positions_1T: Tensor, *, num_depths: int
) -> list[Tensor]:
    model = sublayers.model
    document_T = (positions_1T[0] == 0).cumsum(0)
    place_T = torch.arange(len(document_T), device=document_T.device)
    same_TT = document_T[:, None] == document_T
    back_TT = place_T[:, None] - place_T
    """How many places a column is before a query."""

    def read(cache: GrowingCache, allowed_TC: Tensor) -> Tensor:
        mask_TC = torch.zeros(allowed_TC.shape, dtype=model.dtype, device=allowed_TC.device)
        mask_TC = mask_TC.masked_fill_(~allowed_TC, torch.finfo(model.dtype).min)
        output: Any = trunk(model)(
            input_ids=tokens_1T,
            position_ids=positions_1T,
            attention_mask=mask_TC[None, None],
            past_key_values=cache,
            use_cache=True,
        )
        states_1TD: Tensor = output.last_hidden_state
        return states_1TD

    cache = GrowingCache()
    read(cache, same_TT & (back_TT >= 0))
    beside = cache.beside(skipped.attention)
    found = []
    with sublayers.without(skipped):
        for depth in range(1, num_depths + 1):
            # The query is draft token depth - 1, so its root is depth - 1 places before it.
            before_root_TT = same_TT & (back_TT >= depth)
            drafted = [same_TT & (back_TT == depth - earlier) for earlier in range(1, depth + 1)]
            states_1TD = read(beside, torch.cat([before_root_TT, *drafted], dim=1))
            found.append(states_1TD.roll(1 - depth, dims=1))
    return found
