"""Pseudo states at every position of packed texts, as decoding computes them after its last token.

The text's own states enter the first map's block, run beside the pseudo states and do not see them. So each block has the keys and
values of the text, whatever its architecture.

T = positions of a row, X = rows of a call: the text's, then those of each step, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.linear_head import no_autocast_if_frozen
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters.recomputing import run_part
from drafttrain.target_model.anatomy import blocks, taps, trunk
from drafttrain.target_model.block_range import block_range
from drafttrain.target_model.positions import position_limit

Map = Callable[[Tensor], Tensor]


def pseudo_states(
    model: Any,
    maps: Sequence[Map],
    layers: Sequence[int],
    hidden_BTD: Tensor,
    positions_BT: Tensor,
    *,
    recompute: bool = False,
) -> list[Tensor]:
    """Return final_BTD of the text, then of each step: row t of step k stands for token t + k.

    Rows are read one at a time, with a mask of (1 + steps)^2 T^2 entries.

    Args:
        maps: Of each step, from the text's state to the pseudo state.
        layers: The block that each enters, not falling.
        hidden_BTD: The text's states that enter block `layers[0]`.
        positions_BT: They restart at 0 with each document.
        recompute: Store the states that enter the maps' blocks only, and compute the rest again in the backward pass.
    """
    with no_autocast_if_frozen(model.get_output_embeddings().weight):
        rows = [
            _row(model, maps, layers, hidden_1TD, positions_1T, recompute=recompute)
            for hidden_1TD, positions_1T in zip(hidden_BTD.split(1), positions_BT.split(1), strict=True)
        ]
    return [torch.cat([row[step] for row in rows]) for step in range(len(maps) + 1)]


def _row(
    model: Any,
    maps: Sequence[Map],
    layers: Sequence[int],
    hidden_1TD: Tensor,
    positions_1T: Tensor,
    *,
    recompute: bool,
) -> list[Tensor]:
    stream_1XD, length = hidden_1TD.to(model.dtype), hidden_1TD.shape[1]
    final_1XD = stream_1XD
    for running in parts(layers, num_blocks=len(blocks(model))):
        entering = [maps[step](stream_1XD[:, :length]) for step, layer in enumerate(layers) if layer == running.start]
        stream_1XD, final_1XD = run_part(
            _run,
            torch.cat([stream_1XD, *entering], dim=1),
            positions_1T,
            recompute=recompute,
            model=model,
            running=running,
        )
    return list(final_1XD.split(length, dim=1))


def parts(layers: Sequence[int], *, num_blocks: int) -> list[range]:
    """Return the blocks from each layer to the next, and from the last one to the end."""
    starts = sorted(set(layers))
    return [range(first, last) for first, last in zip(starts, [*starts[1:], num_blocks], strict=True)]


def _run(stream_1XD: Tensor, positions_1T: Tensor, *, model: Any, running: range) -> tuple[Tensor, Tensor]:
    """Return the states that leave these blocks, before and (of the last ones) after the final norm."""
    steps = stream_1XD.shape[1] // positions_1T.shape[1]
    positions_1X = torch.cat([positions_1T + step for step in range(steps)], dim=1)
    limit = position_limit(model)
    if limit is not None:
        # No trained row reads beyond its document's end.
        positions_1X = positions_1X.clamp(max=limit - 1)
    # What leaves the blocks is what enters the next one, or the final norm.
    left = TargetNeeds(hidden=(running.stop,))
    with taps(model, left) as seen, block_range(model, running, entering_BND=stream_1XD):
        output: Any = trunk(model)(
            input_ids=torch.zeros_like(positions_1X),
            position_ids=positions_1X,
            attention_mask=_mask(positions_1T, steps=steps, dtype=stream_1XD.dtype),
            use_cache=False,
        )
    return seen[running.stop], output.last_hidden_state


def _mask(positions_1T: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask_11XX: all rows attend to the text up to their place, pseudo rows also to earlier ones of their place."""
    document_T = (positions_1T[0] == 0).cumsum(0)
    text_TT = (document_T[:, None] == document_T).tril()
    own_TT = torch.eye(len(document_T), dtype=torch.bool, device=document_T.device)
    rows = [
        torch.cat([text_TT, *(own_TT if earlier <= step else ~own_TT & own_TT for earlier in range(1, steps))], dim=1)
        for step in range(steps)
    ]
    allowed_XX = torch.cat(rows)
    mask_XX = torch.zeros(allowed_XX.shape, dtype=dtype, device=allowed_XX.device)
    return mask_XX.masked_fill_(~allowed_XX, torch.finfo(dtype).min)[None, None]
