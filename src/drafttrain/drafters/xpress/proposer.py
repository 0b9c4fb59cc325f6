"""The proposer of XPress: one pass over the block, then passes of the head over its slots.

S = sequences, M = chains that grow, K = draft tokens of a block, E = width of a packed state
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.drafters.chain_draft import Chains
from drafttrain.drafters.dflash.walk_proposer import WalkedModel, WalkProposer
from drafttrain.drafters.few_rows import product_with
from drafttrain.drafters.xpress.passes import Candidates, passes
from drafttrain.drafters.xpress.refiner import RefinerHead


class XPressModel(WalkedModel, Protocol):
    """What drafting needs beside the walk."""

    xpress_head: RefinerHead

    @property
    def num_passes(self) -> int:
        """Passes of a round."""
        ...

    @property
    def num_candidates(self) -> int:
        """Tokens of each slot that are corrected; 0: all."""
        ...


class XPressProposer(WalkProposer):
    """Chains are the argmax after the last pass, FIXED at every temperature. Trees walk, level by level."""

    def __init__(self, model: XPressModel, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._refiner = model.xpress_head
        self._added = product_with([self._refiner.w2])
        self._num_passes, self._num_candidates = model.num_passes, model.num_candidates

    def extend(self, chains: Chains, states_SKE: Tensor) -> None:
        """Draft all tokens of the chains at once, after the last pass. More passes than tokens change nothing, so none is run."""
        hidden_MKE = self.of_growing(chains, states_SKE)
        own_MKD = self._refiner.head_states(hidden_MKE)
        base_MKR = self._vocabulary.logits(self._head(own_MKD))
        size = base_MKR.shape[-1]
        if 0 < self._num_candidates < size:
            candidates = Candidates.best(base_MKR, self._refiner.w2, count=self._num_candidates)
        else:
            candidates = Candidates(base_MKR, lambda factors: self._vocabulary.logits(self._added(factors)))
        roots_M = torch.tensor(chains.newest).to(self._device)
        root_Mr = self._refiner.embed(roots_M, dtype=hidden_MKE.dtype)
        count = min(self._num_passes, hidden_MKE.shape[1])
        *_, (factors_MKr, _) = islice(passes(self._refiner, candidates, hidden_MKE, root_Mr), count + 1)
        assert factors_MKr is not None, "there is one pass or more"
        chains.extend(candidates.logits(factors_MKr, size=size), torch.cat([own_MKD, factors_MKr], dim=-1))
