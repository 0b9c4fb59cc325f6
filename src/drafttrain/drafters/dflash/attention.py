"""Attention of blocks: each slot attends to its document before the root, and to its own block.

Keys and values of the context are those of the whole batch, once. Scores exist for a piece of blocks at a time, and again in the
backward pass; nothing as large as slots times context is stored between the two.

A = blocks, n = blocks of a piece, B = slots of a block, N = slots of the batch, C = columns of a piece, H = heads,
G = key-value heads, d = width of a head, R = query rows of a block for one key-value head, B H / G, O = keys of a block's own
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drafttrain.core.piece_size import PieceSize
from drafttrain.drafters.dflash.blocks import Blocks
from drafttrain.target_model.packed_kernels import wide_type

SCORES = PieceSize(on_cpu=1 << 21, elsewhere=1 << 26)
"""Scores of a piece: 8 MB in float32 on a CPU, 256 MB elsewhere."""


def attend_blocks(
    query_AHBd: Tensor,
    own: tuple[Tensor, Tensor],
    context: tuple[Tensor, Tensor],
    blocks: Blocks,
    *,
    hidden_ABO: Tensor | None = None,
) -> Tensor:
    """Return attended_AHBd.

    Args:
        own: (key_AGOd, value_AGOd), which only their block attends to.
        context: (keys_GNd, values_GNd) of all slots of the batch.
        hidden_ABO: The own keys that a slot does not attend to; None: it attends to all.
    """
    attended_AHBd: Tensor = _BlockAttention.apply(blocks, hidden_ABO, query_AHBd, *own, *context)
    return attended_AHBd


def later_slots(blocks: Blocks, size: int) -> Tensor:
    """Return hidden_ABB of causal blocks: the slots after each one's own."""
    hidden_BB = torch.ones(size, size, dtype=torch.bool, device=blocks.slots_A.device).triu(1)
    return hidden_BB.expand(blocks.count, -1, -1)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Blocks, hidden_ABO: Tensor | None, query_AHBd: Tensor, *states: Tensor) -> Tensor:
        ctx.blocks, ctx.hidden_ABO = blocks, hidden_ABO
        ctx.save_for_backward(query_AHBd, *states)
        own_key, own_value, keys_GNd, values_GNd = states
        attended_AHBd = torch.empty_like(query_AHBd)
        with torch.autocast(query_AHBd.device.type, enabled=False):
            for here, seen in _pieces(blocks, query_AHBd, own_key):
                parts = (query_AHBd[here], own_key[here], own_value[here], keys_GNd[:, seen], values_GNd[:, seen])
                attended_AHBd[here] = _attended(*parts, masks=_masks(blocks, hidden_ABO, here, seen))
        return attended_AHBd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_AHBd: Tensor) -> tuple[Tensor | None, ...]:
        given, blocks = ctx.saved_tensors, ctx.blocks
        of_blocks = [torch.empty_like(states) for states in given[:3]]
        of_context = [torch.zeros_like(states, dtype=wide_type(states)) for states in given[3:]]
        with torch.autocast(gradient_AHBd.device.type, enabled=False):
            for here, seen in _pieces(blocks, given[0], given[1]):
                pieces = [*(states[here] for states in given[:3]), *(states[:, seen] for states in given[3:])]
                parts = [piece.detach().requires_grad_() for piece in pieces]
                with torch.enable_grad():
                    made = _attended(*parts, masks=_masks(blocks, ctx.hidden_ABO, here, seen))
                found = torch.autograd.grad(made, parts, gradient_AHBd[here])
                for whole, part in zip(of_blocks, found[:3], strict=True):
                    whole[here] = part
                for whole, part in zip(of_context, found[3:], strict=True):
                    # A column is read by the blocks of several pieces.
                    whole[:, seen] += part
        of_all = zip([*of_blocks, *of_context], given, strict=True)
        return None, None, *(whole.to(states.dtype) for whole, states in of_all)


Masks = tuple[Tensor, Tensor | None]
"""(slots_n, hidden_nBO): the columns that each block's context has; the own keys that a slot does not attend to, None: no key."""


def _masks(blocks: Blocks, hidden_ABO: Tensor | None, here: slice, seen: slice) -> Masks:
    """Return the masks of a piece."""
    return blocks.slots_A[here] - seen.start, None if hidden_ABO is None else hidden_ABO[here]


def _pieces(blocks: Blocks, query_AHBd: Tensor, own_key_AGOd: Tensor) -> list[tuple[slice, slice]]:
    """Return (blocks, columns) of pieces whose scores are few enough to exist at once."""
    _, heads, size, _ = query_AHBd.shape
    longest = max((span.columns.stop - span.columns.start for span in blocks.spans), default=0)
    at_once = max(1, SCORES.on(query_AHBd.device) // (heads * size * (longest + own_key_AGOd.shape[2])))
    return [(piece.blocks, piece.columns) for piece in blocks.pieces(at_once)]


def _attended(
    query_nHBd: Tensor,
    own_key_nGOd: Tensor,
    own_value_nGOd: Tensor,
    keys_GCd: Tensor,
    values_GCd: Tensor,
    *,
    masks: Masks,
) -> Tensor:
    """Return attended_nHBd of a piece."""
    slots_n, hidden_nBO = masks
    groups, columns, width = keys_GCd.shape
    rows_GnRd = query_nHBd.unflatten(1, (groups, -1)).transpose(0, 1).flatten(2, 3)
    count = rows_GnRd.shape[1]
    context_GnRC = (rows_GnRd.flatten(1, 2) @ keys_GCd.mT).unflatten(1, (count, -1))
    own_GnRO = rows_GnRd @ own_key_nGOd.transpose(0, 1).mT
    scores_GnRY = torch.cat([context_GnRC, own_GnRO], dim=-1).to(wide_type(query_nHBd)) / math.sqrt(width)
    hidden_n1C = torch.arange(columns, device=slots_n.device) >= slots_n[:, None, None]
    hidden_nRO = _of_rows(hidden_nBO, own_GnRO)
    hidden_nRY = torch.cat([hidden_n1C.expand(-1, own_GnRO.shape[2], -1), hidden_nRO], dim=-1)
    weights_GnRY = scores_GnRY.masked_fill(hidden_nRY, -torch.inf).softmax(dim=-1).to(values_GCd.dtype)
    of_context_GnRd = (weights_GnRY[..., :columns].flatten(1, 2) @ values_GCd).unflatten(1, (count, -1))
    attended_GnRd = of_context_GnRd + weights_GnRY[..., columns:] @ own_value_nGOd.transpose(0, 1)
    return attended_GnRd.unflatten(2, (-1, query_nHBd.shape[2])).transpose(0, 1).flatten(1, 2)


def _of_rows(hidden_nBO: Tensor | None, own_GnRO: Tensor) -> Tensor:
    """Return hidden_nRO: the mask of the slots, once for every query head of a group."""
    if hidden_nBO is None:
        return torch.zeros(own_GnRO.shape[1:], dtype=torch.bool, device=own_GnRO.device)
    return hidden_nBO.repeat(1, own_GnRO.shape[2] // hidden_nBO.shape[1], 1)
