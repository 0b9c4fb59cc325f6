"""Attention of blocks: each slot attends to its document before the root, and to its own block.

Keys and values of the context are those of the whole batch, once. Scores exist for a piece of blocks at a time, and again in the
backward pass; nothing as large as slots times context is stored between the two.

A = blocks, n = blocks of a piece, B = slots of a block, N = slots of the batch, C = columns of a piece, H = heads,
G = key-value heads, d = width of a head, R = query rows of a block for one key-value head, B H / G
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drafttrain.drafters.dflash.blocks import Blocks
from drafttrain.target_model.packed_kernels import wide_type

CPU_SCORES = 1 << 21
"""Scores of a piece on a CPU, whose caches hold no more: 8 MB in float32."""
SCORES = 1 << 26
"""Scores of a piece on a GPU: 256 MB in float32."""


def attend_blocks(
    query_AHBd: Tensor,
    own: tuple[Tensor, Tensor],
    context: tuple[Tensor, Tensor],
    blocks: Blocks,
    *,
    causal: bool,
) -> Tensor:
    """Return attended_AHBd.

    Args:
        own: (key_AGBd, value_AGBd) of the blocks' own slots.
        context: (keys_GNd, values_GNd) of all slots of the batch.
        causal: A slot attends only to the slots of its block up to its own.
    """
    attended_AHBd: Tensor = _BlockAttention.apply(blocks, causal, query_AHBd, *own, *context)
    return attended_AHBd


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Blocks, causal: bool, query_AHBd: Tensor, *states: Tensor) -> Tensor:
        ctx.blocks, ctx.causal = blocks, causal
        ctx.save_for_backward(query_AHBd, *states)
        own_key, own_value, keys_GNd, values_GNd = states
        attended_AHBd = torch.empty_like(query_AHBd)
        with torch.autocast(query_AHBd.device.type, enabled=False):
            for here, seen in _pieces(blocks, query_AHBd):
                parts = (query_AHBd[here], own_key[here], own_value[here], keys_GNd[:, seen], values_GNd[:, seen])
                attended_AHBd[here] = _attended(*parts, slots_n=blocks.slots_A[here] - seen.start, causal=causal)
        return attended_AHBd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_AHBd: Tensor) -> tuple[Tensor | None, ...]:
        given, blocks = ctx.saved_tensors, ctx.blocks
        found = [torch.empty_like(states) for states in given[:3]]
        found += [torch.zeros_like(states, dtype=wide_type(states)) for states in given[3:]]
        with torch.autocast(gradient_AHBd.device.type, enabled=False):
            for here, seen in _pieces(blocks, given[0]):
                places = [here, here, here, (slice(None), seen), (slice(None), seen)]
                parts = [states[place].detach().requires_grad_() for states, place in zip(given, places, strict=True)]
                with torch.enable_grad():
                    slots_n = blocks.slots_A[here] - seen.start
                    made = _attended(*parts, slots_n=slots_n, causal=ctx.causal)
                for whole, place, part in zip(
                    found, places, torch.autograd.grad(made, parts, gradient_AHBd[here]), strict=True
                ):
                    if isinstance(place, slice):
                        whole[place] = part
                    else:
                        # A column is read by the blocks of several pieces.
                        whole[place] += part
        return None, None, *(whole.to(states.dtype) for whole, states in zip(found, given, strict=True))


def _pieces(blocks: Blocks, query_AHBd: Tensor) -> list[tuple[slice, slice]]:
    """Return (blocks, columns) of pieces whose scores are few enough to exist at once."""
    _, heads, size, _ = query_AHBd.shape
    limit = CPU_SCORES if query_AHBd.device.type == "cpu" else SCORES
    longest = max((span.columns.stop - span.columns.start for span in blocks.spans), default=0)
    at_once = max(1, limit // (heads * size * (longest + size)))
    return [(piece.blocks, piece.columns) for piece in blocks.pieces(at_once)]


def _attended(
    query_nHBd: Tensor,
    own_key_nGBd: Tensor,
    own_value_nGBd: Tensor,
    keys_GCd: Tensor,
    values_GCd: Tensor,
    *,
    slots_n: Tensor,
    causal: bool,
) -> Tensor:
    """Return attended_nHBd of a piece.

    Args:
        slots_n: Number of columns that each block's context has.
    """
    groups, columns, width = keys_GCd.shape
    rows_GnRd = query_nHBd.unflatten(1, (groups, -1)).transpose(0, 1).flatten(2, 3)
    count = rows_GnRd.shape[1]
    context_GnRC = (rows_GnRd.flatten(1, 2) @ keys_GCd.mT).unflatten(1, (count, -1))
    own_GnRB = rows_GnRd @ own_key_nGBd.transpose(0, 1).mT
    scores_GnRY = torch.cat([context_GnRC, own_GnRB], dim=-1).to(wide_type(query_nHBd)) / math.sqrt(width)
    hidden_n1C = torch.arange(columns, device=slots_n.device) >= slots_n[:, None, None]
    hidden_nRY = torch.cat(
        [hidden_n1C.expand(-1, own_GnRB.shape[2], -1), _later_slots(own_GnRB, causal=causal)], dim=-1
    )
    weights_GnRY = scores_GnRY.masked_fill(hidden_nRY, -torch.inf).softmax(dim=-1).to(values_GCd.dtype)
    of_context_GnRd = (weights_GnRY[..., :columns].flatten(1, 2) @ values_GCd).unflatten(1, (count, -1))
    attended_GnRd = of_context_GnRd + weights_GnRY[..., columns:] @ own_value_nGBd.transpose(0, 1)
    return attended_GnRd.unflatten(2, (-1, query_nHBd.shape[2])).transpose(0, 1).flatten(1, 2)


def _later_slots(own_GnRB: Tensor, *, causal: bool) -> Tensor:
    """Return hidden_nRB: with a causal block, the slots after each row's own."""
    _, count, rows, size = own_GnRB.shape
    hidden_BB = torch.ones(size, size, dtype=torch.bool, device=own_GnRB.device).triu(1) if causal else None
    if hidden_BB is None:
        return torch.zeros(count, rows, size, dtype=torch.bool, device=own_GnRB.device)
    return hidden_BB.repeat(rows // size, 1).expand(count, -1, -1)
