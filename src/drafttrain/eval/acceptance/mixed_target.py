"""Mixed target: draft tokens are tested against the target's distribution moved towards the drafter's. LOSSY: the output changes.

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

NEEDS_DRAWN_CHAINS = "mixed_target moves the target towards the distribution that a chain is drawn from"


@dataclass
class MixedTargetSettings:
    """Test draft tokens against the target moved towards the drafter. Lossy above margin 0."""

    margin: float = setting(10.0, help="How far the target's logits move towards the drafter; 0 is lossless.", ge=0)
    floor: float = setting(
        0.1, help="Only tokens with this share of the drafter's largest probability are moved.", ge=0, le=1
    )


@acceptance_rules.register("mixed_target", MixedTargetSettings)
class MixedTarget:
    """Accepts x with chance min(1, p'(x) / q(x)), p' = softmax(log p - margin (p - q)) with p - q only where q is large enough.

    p - q is the slope of KL(q || p) in the target's logits: a step of distillation at each position. After a rejection a token is
    drawn from norm(max(p - min(q, p'), 0)), so the output's distribution is neither p nor p': it is min(q, p') + (1 - sum min(q, p'))
    times that residual. FIXED nodes have no q, and are tested as by the lossless rule.

    Source: Chen et al. 2025, RAPID, arXiv 2502.20330.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY
    needs = TargetNeeds()

    def __init__(self, settings: MixedTargetSettings | None = None) -> None:
        self.settings = settings or MixedTargetSettings()

    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: torch.Generator
    ) -> tuple[list[int], int | None]:
        return walk(proposal, target_probs, RandomDecisions(generator), moved=self.moved)

    def moved(self, target_V: Tensor, drafter_V: Tensor) -> Tensor:
        """Return p' of p and q. Tokens without probability in p have none in it."""
        difference_V = (target_V - drafter_V).masked_fill(drafter_V < self.settings.floor * drafter_V.max(), 0.0)
        return (target_V.log() - self.settings.margin * difference_V).softmax(dim=-1)
