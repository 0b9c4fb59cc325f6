"""The compositional embedder: one embedding for a segment of several tokens.

N = segments, S = most tokens of a segment, D = hidden, H = heads, E = width of a head
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SegmentEmbedder(nn.Module):
    """The mean of a segment's embeddings, plus an attention over them whose query is the mean. It starts at the mean.

    A segment of one token is its embedding, bit for bit.

    Source: Liu et al. 2025, HAMburger, arXiv 2505.20438.
    """

    def __init__(self, width: int, num_heads: int, size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.size = size
        with_place = width + width // 2
        self.places = nn.Parameter(torch.randn(size, width // 2) * 0.02)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(with_place, width)
        self.v_proj = nn.Linear(with_place, width)
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, back_NSD: Tensor, place_N: Tensor) -> Tensor:
        """Return embedded_ND, in the type of the embeddings.

        Args:
            back_NSD: Embeddings of the last S tokens, the newest first; those before the segment are not read.
            place_N: The place of the newest token in its segment, from 0.
        """
        step_S = torch.arange(self.size, device=place_N.device)
        inside_NS = step_S <= place_N[:, None]
        own_NSD = back_NSD.to(self.places.dtype).masked_fill(~inside_NS[:, :, None], 0)
        mean_ND = own_NSD.sum(dim=1) / (place_N[:, None] + 1)
        placed_NSP = torch.cat([own_NSD, self.places[(place_N[:, None] - step_S).clamp(min=0)]], dim=-1)
        query_NHE = self.q_proj(mean_ND).unflatten(-1, (self.num_heads, -1))
        key_NSHE, value_NSHE = (
            proj(placed_NSP).unflatten(-1, (self.num_heads, -1)) for proj in (self.k_proj, self.v_proj)
        )
        attended_NHE = attend(query_NHE[:, None], key_NSHE, value_NSHE, inside_NS[:, None])[:, 0]
        merged_ND = mean_ND + self.out_proj(attended_NHE.flatten(1))
        return torch.where(place_N[:, None] > 0, merged_ND.to(back_NSD.dtype), back_NSD[:, 0])


def attend(query_NQHE: Tensor, key_NKHE: Tensor, value_NKHE: Tensor, allowed_NQK: Tensor) -> Tensor:
    """Return attended_NQHE over a few keys: K is the length of a segment, not of a text."""
    scores_NHQK = torch.einsum("nqhe,nkhe->nhqk", query_NQHE, key_NKHE) / query_NQHE.shape[-1] ** 0.5
    weights_NHQK = scores_NHQK.masked_fill(~allowed_NQK[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("nhqk,nkhe->nqhe", weights_NHQK.to(value_NKHE.dtype), value_NKHE)


def look_back(values_N: Tensor, size: int) -> Tensor:
    """Return values_NS: the last `size` values at every place, the newest first; 0 before the first one."""
    count = len(values_N)
    padded = torch.cat([values_N.new_zeros(size - 1, *values_N.shape[1:]), values_N])
    return torch.stack([padded[size - 1 - step : size - 1 - step + count] for step in range(size)], dim=1)
