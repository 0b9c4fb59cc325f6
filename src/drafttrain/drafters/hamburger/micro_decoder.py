"""The micro decoder: from the target's states after the last complete segment, the tokens of the next one, and where it ends.

M = complete segments, F = tapped states of each, N = tokens of open segments, S = most tokens of a segment, D = hidden, H = heads,
E = width of a head
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from drafttrain.drafters.hamburger.embedder import attend, look_back


class MicroLayer(nn.Module):
    """A Llama layer without rotation: its sequence has a few places, which are learned."""

    def __init__(self, width: int, num_heads: int, intermediate_size: int, *, size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.size = size
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_proj, self.up_proj = (nn.Linear(width, intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, macro_MFD: Tensor, states_ND: Tensor, macro_N: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the layer makes of the tapped states and of the tokens.

        A tapped state attends to those before it; a token to all of its complete segment and to the tokens of its own segment so far.

        Args:
            macro_N: By token, the complete segment that it follows.
            place_N: Its place in its segment. Tokens of a segment are one after another.
        """
        query_MFHE, key_MFHE, value_MFHE = self._heads(macro_MFD)
        query_NHE, key_NHE, value_NHE = self._heads(states_ND)
        taps = macro_MFD.shape[1]
        before_FF = torch.ones(taps, taps, dtype=torch.bool, device=place_N.device).tril()
        inside_NS = torch.arange(self.size, device=place_N.device) <= place_N[:, None]
        allowed_NK = torch.cat([inside_NS.new_ones(len(place_N), taps), inside_NS], dim=1)
        keys_NKHE, values_NKHE = (
            torch.cat([of_macro.index_select(0, macro_N), look_back(of_tokens, self.size)], dim=1)
            for of_macro, of_tokens in ((key_MFHE, key_NHE), (value_MFHE, value_NHE))
        )
        attended_MFHE = attend(query_MFHE, key_MFHE, value_MFHE, before_FF[None])
        attended_NHE = attend(query_NHE[:, None], keys_NKHE, values_NKHE, allowed_NK[:, None])[:, 0]
        return self._after(macro_MFD, attended_MFHE), self._after(states_ND, attended_NHE)

    def _heads(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.attention_norm(states)
        query, key, value = (
            proj(normed).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def _after(self, states: Tensor, attended: Tensor) -> Tensor:
        states = states + self.o_proj(attended.flatten(-2))
        normed = self.mlp_norm(states)
        return states + self.down_proj(silu(self.gate_proj(normed)) * self.up_proj(normed))


class MicroDecoder(nn.Module):
    """The state of a token predicts the token after it; the stop head reads the same state, and judges whether that token joins.

    Source: Liu et al. 2025, HAMburger, arXiv 2505.20438. Two things are our own: places are learned, not rotated; and whether token
    i + 1 joins is judged with token i known (the authors' code: from the state before it).
    """

    def __init__(
        self, width: int, num_heads: int, intermediate_size: int, *, num_layers: int, num_taps: int, size: int
    ) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(num_taps + size, width) * 0.02)
        self.layers = nn.ModuleList(
            MicroLayer(width, num_heads, intermediate_size, size=size) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.stop = nn.Sequential(
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        )

    def forward(self, macro_MFD: Tensor, embedded_ND: Tensor, macro_N: Tensor, place_N: Tensor) -> Tensor:
        """Return states_ND, which the target's head and the stop head read.

        Args:
            macro_MFD: The target's tapped states after each complete segment.
            embedded_ND: The target's embeddings of the tokens of open segments, one after another.
            macro_N: By token, the complete segment that it follows.
            place_N: Its place in its segment, from 0.
        """
        kind, taps = self.places.dtype, macro_MFD.shape[1]
        macro_MFD = macro_MFD.to(kind) + self.places[:taps]
        states_ND = embedded_ND.to(kind) + self.places[taps + place_N]
        for layer in self.layers:
            macro_MFD, states_ND = layer(macro_MFD, states_ND, macro_N, place_N)
        normed_ND: Tensor = self.norm(states_ND)
        return normed_ND

    def goes_on(self, states_ND: Tensor) -> Tensor:
        """Return logits_N that the next token joins the segment."""
        logits_N: Tensor = self.stop(states_ND)[:, 0]
        return logits_N
