"""Passes of the head over all slots of blocks: each pass reads the tokens of the pass before it.

Slot k depends on the tokens before it alone, so the first p tokens of pass p are those of a draft from left to right, and stay.

A = blocks, K = draft tokens of a block, E = width of a packed state, r = rank, R = tokens that can be drafted, C = candidates of a
slot
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drafttrain.drafters.xpress.refiner import RefinerHead


@dataclass(frozen=True)
class Candidates:
    """The tokens of which each slot takes the likeliest."""

    base_AKC: Tensor
    """Their logits before any correction."""
    added: Callable[[Tensor], Tensor]
    """Returns their corrections of factor_AKr."""
    ids_AKC: Tensor | None = None
    """Their ids, in rising order; None: all tokens."""

    @classmethod
    def best(cls, base_AKR: Tensor, w2: nn.Linear, *, count: int) -> Candidates:
        """Return the tokens with the largest base logits of each slot. Only their rows of w2 are read, once for all passes."""
        ids_AKC = base_AKR.topk(count, dim=-1).indices.sort(dim=-1).values
        rows_AKCr = w2.weight.detach()[ids_AKC]
        return cls(
            base_AKR.gather(-1, ids_AKC),
            lambda factors_AKr: (rows_AKCr @ factors_AKr[..., None])[..., 0],
            ids_AKC,
        )

    def tokens(self, factors_AKr: Tensor | None) -> Tensor:
        """Return tokens_AK, the argmax of each slot; of the base logits if there are no factors."""
        # Not `argmax`, whose kernel for bfloat16 takes several times as long. Both return the first of equal maxima.
        places_AK = self._logits(factors_AKr).max(dim=-1).indices
        return places_AK if self.ids_AKC is None else self.ids_AKC.gather(-1, places_AK[..., None])[..., 0]

    def logits(self, factors_AKr: Tensor, *, size: int) -> Tensor:
        """Return logits_AKR of `size` tokens; -inf for those that are no candidates."""
        logits_AKC = self._logits(factors_AKr)
        if self.ids_AKC is None:
            return logits_AKC
        lowest = logits_AKC.new_full((*logits_AKC.shape[:2], size), float("-inf"))
        return lowest.scatter(-1, self.ids_AKC, logits_AKC)

    def _logits(self, factors_AKr: Tensor | None) -> Tensor:
        return self.base_AKC if factors_AKr is None else self.base_AKC + self.added(factors_AKr)


@torch.no_grad()
def passes(
    head: RefinerHead, candidates: Candidates, hidden_AKE: Tensor, root_Ar: Tensor
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield (factor_AKr, tokens_AK) without end: those of the base logits, which have no factors, then those of each pass.

    Args:
        hidden_AKE: Of `RefinerHead.packed`.
        root_Ar: w1 of the root of each block.
    """
    factors_AKr: Tensor | None = None
    while True:
        tokens_AK = candidates.tokens(factors_AKr)
        yield factors_AKr, tokens_AK
        factors_AKr = head.factors(hidden_AKE, before(head, tokens_AK, root_Ar))


def before(head: RefinerHead, tokens_AK: Tensor, root_Ar: Tensor) -> Tensor:
    """Return embedded_AKr, w1 of the token before each slot's: of the root, then of these tokens but the last."""
    return torch.cat([root_Ar[:, None], head.embed(tokens_AK[:, :-1], dtype=root_Ar.dtype)], dim=1)
