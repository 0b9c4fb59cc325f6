"""The walk of Domino: a recurrent state of the block's tokens so far, and a correction of low rank.

A = blocks, K = draft tokens of a block, D = hidden, g = width of the recurrent state, e = rank of the correction
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from drafttrain.drafters.eagle.target_parts import TargetParts

STD = 0.02
"""Of the initial weights of the projection."""


class PrefixGru(nn.Module):
    """A gated recurrent unit without biases, with the gates and names of `torch.nn.GRU`.

    r = sigmoid(W_ir x + W_hr s); z = sigmoid(W_iz x + W_hz s); n = tanh(W_in x + r * (W_hn s)); s' = (1 - z) * n + z * s.
    It is not `torch.nn.GRU`, so that a step of decoding and a whole block of training are the same arithmetic.

    Source: Cho et al. 2014, arXiv 1406.1078, with the reset gate after the product, as cuDNN has it.
    """

    def __init__(self, *, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        for weight in self.parameters():
            nn.init.uniform_(weight, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def step(self, embedded_AD: Tensor, state_Ag: Tensor) -> Tensor:
        """Return the state after one more token."""
        return self._next(linear(embedded_AD, self.weight_ih_l0), state_Ag)

    def states(self, embedded_AKD: Tensor) -> Tensor:
        """Return state_AKg after each token of blocks, from a state of zero."""
        state_Ag = embedded_AKD.new_zeros(len(embedded_AKD), self.hidden_size)
        found = []
        for inputs_Aj in linear(embedded_AKD, self.weight_ih_l0).unbind(1):
            state_Ag = self._next(inputs_Aj, state_Ag)
            found.append(state_Ag)
        return torch.stack(found, dim=1)

    def _next(self, inputs_Aj: Tensor, state_Ag: Tensor) -> Tensor:
        in_r, in_z, in_n = inputs_Aj.chunk(3, dim=-1)
        of_r, of_z, of_n = linear(state_Ag, self.weight_hh_l0).chunk(3, dim=-1)
        reset_Ag, keep_Ag = (in_r + of_r).sigmoid(), (in_z + of_z).sigmoid()
        new_Ag = (in_n + reset_Ag * of_n).tanh()
        return (1 - keep_Ag) * new_Ag + keep_Ag * state_Ag


def correction(*, hidden_size: int, state_size: int, rank: int, num_tokens: int) -> nn.Sequential:
    """Return the layers of W_b SiLU(W_a [h ; s]). W_b is zero at first, so that training starts from the slots' own logits."""
    into, out = nn.Linear(hidden_size + state_size, rank, bias=False), nn.Linear(rank, num_tokens, bias=False)
    nn.init.normal_(into.weight, std=STD)
    nn.init.zeros_(out.weight)
    return nn.Sequential(into, nn.SiLU(), out)


@dataclass(frozen=True)
class PrefixWalk:
    """f_k = SiLU(W_a [h_k ; s_k]), s_k the state after all tokens of the block before the one that slot k predicts.

    It is no module: the tensors of a published checkpoint have no name before `prefix_gru` and `embed_proj`.
    """

    gru: PrefixGru
    projections: nn.Sequential
    parts: TargetParts
    uncorrected: int
    """Slots at the start of a block whose logits stay the block's own: their factors are 0."""

    @property
    def added(self) -> nn.Linear:
        """W_b."""
        layer = self.projections[2]
        assert isinstance(layer, nn.Linear)
        return layer

    def embed(self, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return the target's embedding of tokens."""
        return self.parts.embed(tokens, dtype=dtype)

    def start(self, hidden_AD: Tensor) -> Tensor:
        """Return the state before the first token of a block: zeros."""
        return hidden_AD.new_zeros(len(hidden_AD), self.gru.hidden_size)

    def step(self, place: int, hidden_AD: Tensor, embedded_AD: Tensor, state_Ag: Tensor) -> tuple[Tensor, Tensor]:
        """Return (factor_Ae, state_Ag) of a slot."""
        state_Ag = self.gru.step(embedded_AD, state_Ag).to(hidden_AD.dtype)
        factor_Ae = self._factor(hidden_AD, state_Ag)
        return factor_Ae if place >= self.uncorrected else torch.zeros_like(factor_Ae), state_Ag

    def factors(self, hidden_AKD: Tensor, embedded_AKD: Tensor) -> Tensor:
        """Return factor_AKe of all slots."""
        factors_AKe = self._factor(hidden_AKD, self.gru.states(embedded_AKD).to(hidden_AKD.dtype))
        return pad(factors_AKe[:, self.uncorrected :], (0, 0, self.uncorrected, 0))

    def _factor(self, hidden: Tensor, state: Tensor) -> Tensor:
        into, activation, _ = self.projections
        factor: Tensor = activation(into(torch.cat([hidden, state], dim=-1)))
        return factor
