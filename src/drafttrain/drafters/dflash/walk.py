"""A walk over the slots of a block from left to right: each slot's logits get a correction by the tokens before it.

A = blocks, K = draft tokens of a block, D = hidden, e = width of an embedded token, f = width of a factor,
s = width of the walk's state, W = width of the drafter's head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class Walk(Protocol):
    """The logits of slot k are made of head(h_k) and f_k, which depends on h_k and on the tokens before the one that slot k predicts."""

    def embed(self, tokens: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return what the walk reads of tokens, given as the target's ids."""
        ...

    def start(self, hidden_AD: Tensor) -> Tensor:
        """Return state_As before the first token of a block."""
        ...

    def step(self, place: int, hidden_AD: Tensor, embedded_Ae: Tensor, state_As: Tensor) -> tuple[Tensor, Tensor]:
        """Return (factor_Af, state_As) of a slot, and the state after it.

        Args:
            place: The slot's number among those that predict, from 0.
            hidden_AD: Its state, after the final norm.
            embedded_Ae: `embed` of the token before the one that the slot predicts.
        """
        ...

    def factors(self, hidden_AKD: Tensor, embedded_AKe: Tensor) -> Tensor:
        """Return factor_AKf of all slots, whose tokens before are known: the same numbers as from slot to slot."""
        ...


class AddingWalk(Walk, Protocol):
    """logits of slot k = head(h_k) + added(f_k)."""

    @property
    def added(self) -> nn.Linear:
        """The layer without bias that makes logits of the factors."""
        ...


Correction = Callable[[Tensor, Tensor], Tensor]
"""Returns logits_AW of (base_AW, factor_Af): those of the head alone, and the factors of the walk."""
