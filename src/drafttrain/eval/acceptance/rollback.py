"""Rollback (BiLD): a draft token is replaced only where it is far from the target. LOSSY: the output's distribution changes.

N = nodes, V = vocabulary, D = hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.proposals import Exactness, Proposal
from drafttrain.core.settings import setting
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.verification import RandomDecisions, walk


@dataclass
class RollbackSettings:
    """Accept what the lossless rule accepts, and draft tokens near the target. Lossy above threshold 0."""

    threshold: float | None = setting(
        5.0,
        help="Roll back at a rejected draft token x where -log p(x), in nats at temperature 1, is above this. 0: lossless; null: never.",
        ge=0,
    )


@acceptance_rules.register("rollback", RollbackSettings)
class Rollback:
    """Where the lossless walk rejects all children of a node, the first child x with -log p(x) <= threshold is accepted.

    The distance is the cross-entropy between p and the drafter's token as a hard label, p at temperature 1 whatever the sampling. At
    temperature 0 this is BiLD's decoding: a token is replaced by the target's argmax where it differs from it and is too far. With
    `length: {kind: fallback}` the drafter decides when the target reads its tokens.

    Source: Kim et al. 2023, Speculative Decoding with Big Little Decoder, arXiv 2302.07863, 3.4. What happens above temperature 0 is
        this project's choice.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY
    needs = TargetNeeds()

    def __init__(self, settings: RollbackSettings | None = None) -> None:
        self.settings = settings or RollbackSettings()

    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: torch.Generator
    ) -> tuple[list[int], int | None]:
        threshold = self.settings.threshold
        # At 0 no token passes: the lossless rule decides alone.
        far = distances(proposal, target_probs) if threshold else [0.0] * len(proposal.tokens_N)
        return walk(
            proposal,
            target_probs,
            RandomDecisions(generator),
            overrule=lambda node: threshold is None or (threshold > 0 and far[node] <= threshold),
        )


def distances(proposal: Proposal, target_probs: TargetProbs) -> list[float]:
    """Return -log p(x) of the token of each node, in nats; 0 for the root. The device is read once."""
    log_probs_NV = target_probs.log_probs_at_one()
    parents_N, tokens_N = (ids_N[1:].to(log_probs_NV.device) for ids_N in (proposal.parents_N, proposal.tokens_N))
    found: list[float] = (-log_probs_NV[parents_N, tokens_N]).tolist()
    return [0.0, *found]
