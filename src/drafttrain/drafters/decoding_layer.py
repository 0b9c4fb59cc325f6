"""The parts of a Llama layer as decoding runs them: plain tensors, fused products, one attention call.

They compute what the modules do that they are made of; an identity test holds each of them to its module.

B = sequences, N = new tokens of one call, C = columns of the cache, H = heads, G = key-value heads, d = width of a head,
X = input width of the projections, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from drafttrain.drafters.few_rows import product_with
from drafttrain.target_model.grouped_attention import attend_in_groups

FEW_QUERIES = 32
"""Up to this many queries, the heads that share keys are read as more queries of one head."""

Turn = tuple[Tensor, Tensor]
"""(cos_BN1d, sin_BN1d) of the positions of new tokens, the first half of each sine negated (see `turned`)."""


class DecodingAttention:
    """The projections of an attention block.

    Args:
        projections: A module with q_proj, k_proj, v_proj and o_proj. It may have q_norm and k_norm, as Qwen3 has.
    """

    def __init__(self, projections: Any, *, head_dim: int) -> None:
        linears = [projections.q_proj, projections.k_proj, projections.v_proj]
        self._head_dim = head_dim
        queries, keys, _ = (linear.out_features // head_dim for linear in linears)
        self._heads = [queries + keys, keys]
        self._rotated = [queries, keys]
        has_norms = getattr(projections, "q_norm", None) is not None
        self._norms = [projections.q_norm, projections.k_norm] if has_norms else []
        self._enter, self._leave = product_with(linears), product_with([projections.o_proj])

    def project(self, inputs_BNX: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Return (query_BHNd, key_BGNd, value_BGNd), the first two rotated."""
        heads_BNHd = self._enter(inputs_BNX).unflatten(-1, (-1, self._head_dim))
        rotary_BNHd, value_BNGd = heads_BNHd.split(self._heads, dim=2)
        if self._norms:
            parts = rotary_BNHd.split(self._rotated, dim=2)
            rotary_BNHd = torch.cat([norm(part) for norm, part in zip(self._norms, parts, strict=True)], dim=2)
        query_BNHd, key_BNGd = turned(rotary_BNHd, turn).split(self._rotated, dim=2)
        return query_BNHd.transpose(1, 2), key_BNGd.transpose(1, 2), value_BNGd.transpose(1, 2)

    def output(self, attended_BHNd: Tensor) -> Tensor:
        """Return added_BND, what the block adds to the residual stream."""
        return self._leave(attended_BHNd.transpose(1, 2).flatten(2))


class DecodingSwiGLU:
    """down(silu(gate) * up).

    Args:
        mlp: A module with gate_proj, up_proj and down_proj.
    """

    def __init__(self, mlp: Any) -> None:
        self._enter, self._leave = product_with([mlp.gate_proj, mlp.up_proj]), product_with([mlp.down_proj])

    def __call__(self, states_BND: Tensor) -> Tensor:
        """Return what the block adds to the residual stream."""
        gate, up = self._enter(states_BND).chunk(2, dim=-1)
        return self._leave(silu(gate) * up)


class TurnTable:
    """The rotary angles of all positions, computed once. Positions are then rows of a table.

    Args:
        angles: Returns (cos_BNd, sin_BNd) of positions_BN, in the type of its second argument.
        fixed: The angle of a position is the same in every call. With rope type `dynamic` it is not: then every call
            computes its own.
    """

    def __init__(self, angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *, fixed: bool = True) -> None:
        self._angles = angles
        self._fixed = fixed
        self._table_CY = torch.empty(0)
        """By position, cosines and then sines."""

    def at(self, positions_BN: Tensor, *, last: int, like: Tensor) -> Turn:
        """Return the angles of these positions in the type of `like`.

        Args:
            last: The largest position.
        """
        if not self._fixed:
            return _turn(self._computed(positions_BN, like))
        if last >= len(self._table_CY):
            self._table_CY = self._computed(torch.arange(2 * last + 128, device=like.device)[None], like)[0]
        return _turn(self._table_CY[positions_BN])

    def _computed(self, positions_BN: Tensor, like: Tensor) -> Tensor:
        cos_BNd, sin_BNd = self._angles(positions_BN, like)
        first, second = sin_BNd.chunk(2, dim=-1)
        return torch.cat([cos_BNd, -first, second], dim=-1)


def _turn(table_BNY: Tensor) -> Turn:
    cos_BN1d, sin_BN1d = table_BNY.unsqueeze(2).chunk(2, dim=-1)
    return cos_BN1d, sin_BN1d


def turned(states_BNHd: Tensor, turn: Turn) -> Tensor:
    """Return states rotated to their positions: coordinate i is paired with i + d/2."""
    cos_BN1d, sin_BN1d = turn
    return states_BNHd * cos_BN1d + states_BNHd.roll(states_BNHd.shape[-1] // 2, dims=-1) * sin_BN1d


def attend(
    query_BHNd: Tensor, keys_BGCd: Tensor, values_BGCd: Tensor, allowed_BNC: Tensor | None, *, causal: bool = False
) -> Tensor:
    """Return attended_BHNd.

    Args:
        allowed_BNC: The columns that each query may attend to, at least one; None: all of them.
        causal: Instead, query i attends to columns 0..i, of as many columns as queries. Of a long prompt a mask would take more memory
            than everything else.
    """
    groups, queries = keys_BGCd.shape[1], query_BHNd.shape[2]
    shared = query_BHNd.shape[1] // groups
    if causal:
        return scaled_dot_product_attention(query_BHNd, keys_BGCd, values_BGCd, is_causal=True, enable_gqa=shared > 1)
    allowed_B1NC = None if allowed_BNC is None else allowed_BNC[:, None]
    if shared == 1 or queries > FEW_QUERIES:
        return scaled_dot_product_attention(
            query_BHNd, keys_BGCd, values_BGCd, attn_mask=allowed_B1NC, enable_gqa=shared > 1
        )
    # Otherwise PyTorch copies the keys for each of the heads that share them, in every call.
    if allowed_B1NC is not None and queries > 1:
        allowed_B1NC = allowed_B1NC.repeat(1, 1, shared, 1)
    return attend_in_groups(query_BHNd, keys_BGCd, values_BGCd, allowed_B1NC)
