"""Drafting with the target itself, without some of its sublayers."""

from __future__ import annotations

from drafttrain.drafters.causal_lm.proposer import LMProposer
from drafttrain.drafters.layer_skip.beside import LMBeside
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.sublayers import Skipped, Sublayers


class LayerSkipProposer(LMProposer):
    """Drafts chains and trees. Its calls are in the target's ledger, under a name of their own.

    Args:
        draft: `sampled`, or `greedy`: FIXED nodes at every temperature.
    """

    def __init__(self, target: Target, skipped: Skipped, *, draft: str = "sampled") -> None:
        self._beside = LMBeside(Sublayers(target.model), skipped)
        rows = target.vocab_size
        super().__init__(self._beside, rows=rows, target_vocab_size=rows, num_tokens=target.num_tokens, draft=draft)

    def share(self, target: CachedLM) -> None:
        """Store the verifying target."""
        self._beside.sublayers.check()
        self._beside.target = target
