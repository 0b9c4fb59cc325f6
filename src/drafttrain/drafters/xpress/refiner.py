"""The head of XPress: a correction of low rank of each slot's logits by the tokens before it, mixed over the block's slots.

A = blocks, B = slots of a block, K = draft tokens of a block, D = hidden, r = rank, E = D + r, the width of a state as the head
packs it, V = vocabulary
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from drafttrain.drafters.eagle.layer import SwiGLU

STD = 0.02
"""Of the initial weights."""


class CausalMix(nn.Module):
    """For each channel, its own lower triangular matrix over the slots of a block, added to the identity."""

    def __init__(self, channels: int, block_size: int) -> None:
        super().__init__()
        self.L = nn.Parameter(torch.zeros(channels, block_size, block_size))

    def forward(self) -> Tensor:
        """Return mix_rBB: what slot b (second axis) takes from slot j (third axis), 0 for j > b."""
        return self.L.tril() + torch.eye(self.L.shape[-1], dtype=self.L.dtype, device=self.L.device)


class RefinerHead(nn.Module):
    """A walk (`dflash.walk.Walk`) that also corrects all slots of a block at once, which is a pass.

    With g the mean of h over ALL slots of the block, and prev_b the token before the one that slot b predicts:
    z_b = in_proj [down_h h_b ; down_g g ; w1[prev_b]]; u_b = z_b + sum over j <= b of L_bj z_j, by channel;
    x_b = u_b + mlp(u_b); logits_b = head(h_b) + w2 x_b.

    The token before the root does not enter: the root stands in for it, as vLLM does. u is linear in z. So the part of u that
    comes of the states is computed once a block (`packed`), and a pass adds the part that comes of its tokens. Tensors have the
    published names.

    Source: Wang et al. 2026, xPress, arXiv 2608.02438.
    """

    def __init__(self, *, vocab_size: int, hidden_size: int, block_size: int, rank: int, mlp_hidden: int) -> None:
        super().__init__()
        self.rank, self.block_size = rank, block_size
        self.w1 = nn.Embedding(vocab_size, rank)
        self.down_h = nn.Linear(hidden_size, rank, bias=False)
        self.down_g = nn.Linear(hidden_size, rank, bias=False)
        self.in_proj = nn.Linear(3 * rank, rank, bias=False)
        self.mix = CausalMix(rank, block_size)
        self.mlp = SwiGLU(SimpleNamespace(hidden_size=rank, intermediate_size=mlp_hidden))
        self.w2 = nn.Linear(rank, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=STD)

    @property
    def added(self) -> nn.Linear:
        """w2."""
        return self.w2

    def packed(self, states_ABD: Tensor) -> Tensor:
        """Return hidden_AKE of the slots that predict: their states, and the part of u that no token changes.

        Args:
            states_ABD: Of all slots of the blocks, after the final norm.
        """
        global_A1r = self.down_g(states_ABD.mean(dim=1, keepdim=True))
        seen_AB2r = torch.cat([self.down_h(states_ABD), global_A1r.expand(-1, states_ABD.shape[1], -1)], dim=-1)
        entering_ABr = self.in_proj(pad(seen_AB2r, (0, self.rank)))
        mixed_ABr = torch.einsum("rbj,ajr->abr", self.mix().to(entering_ABr.dtype), entering_ABr)
        return torch.cat([states_ABD, mixed_ABr.to(states_ABD.dtype)], dim=-1)[:, 1:]

    def head_states(self, hidden_AKE: Tensor) -> Tensor:
        """Return states_AKD, without what `packed` added."""
        return hidden_AKE[..., : -self.rank]

    def embed(self, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return w1 of tokens, given as the target's ids."""
        embedded: Tensor = self.w1(tokens)
        return embedded.to(dtype)

    def start(self, hidden_AE: Tensor) -> Tensor:
        """Return state_AKr: by slot, the part of u that comes of the block's tokens so far."""
        return hidden_AE.new_zeros(len(hidden_AE), self.block_size - 1, self.rank)

    def step(self, place: int, hidden_AE: Tensor, embedded_Ar: Tensor, state_AKr: Tensor) -> tuple[Tensor, Tensor]:
        """Return (factor_Ar, state_AKr) of a slot: what w2 multiplies, and the state after the token before it.

        Args:
            place: The slot's number among those that predict, from 0.
            hidden_AE: Of `packed`.
            embedded_Ar: w1 of the token before the one that the slot predicts.
        """
        entering_Ar = self._of_token(embedded_Ar)
        taken_rK = self._of_slots(entering_Ar.dtype)[..., place]
        state_AKr = state_AKr + (taken_rK.T * entering_Ar[:, None]).to(state_AKr.dtype)
        return self._factor(hidden_AE, state_AKr[:, place]), state_AKr

    def factors(self, hidden_AKE: Tensor, embedded_AKr: Tensor) -> Tensor:
        """Return factor_AKr of all slots, given the token before each: the same numbers as from slot to slot."""
        entering_AKr, count = self._of_token(embedded_AKr), embedded_AKr.shape[1]
        taken_rKK = self._of_slots(entering_AKr.dtype)[:, :count, :count]
        return self._factor(hidden_AKE, torch.einsum("rkj,ajr->akr", taken_rKK, entering_AKr))

    def _of_token(self, embedded: Tensor) -> Tensor:
        entering: Tensor = self.in_proj(pad(embedded, (2 * self.rank, 0)))
        return entering

    def _of_slots(self, dtype: torch.dtype) -> Tensor:
        """Return taken_rKK among the slots that predict. The root's slot reads the root, as the slot after it does."""
        mix_rBB = self.mix().to(dtype)
        first_rK1 = mix_rBB[:, 1:, :1] + mix_rBB[:, 1:, 1:2]
        return torch.cat([first_rK1, mix_rBB[:, 1:, 2:]], dim=-1)

    def _factor(self, hidden: Tensor, of_tokens: Tensor) -> Tensor:
        u = hidden[..., -self.rank :] + of_tokens
        factor: Tensor = u + self.mlp(u)
        return factor
