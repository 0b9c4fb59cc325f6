"""Typical acceptance: accept tokens that are likely for the entropy of the target. LOSSY: the distribution changes.

N = nodes, V = vocabulary, D = hidden
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.probability import draw
from drafttrain.core.proposals import Exactness, Proposal
from drafttrain.core.settings import setting
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.verification import TokenProbs


@dataclass
class TypicalSettings:
    """Accept x iff p(x) > min(epsilon, delta exp(-H(p))). Lossy above temperature 0."""

    epsilon: float = setting(0.09, help="A token at least this likely is always accepted.", gt=0, lt=1)
    delta: float = setting(
        0.3, help="A token needs this share of exp(-entropy) where the target is unsure; sqrt(epsilon) is usual.", gt=0
    )


@acceptance_rules.register("typical", TypicalSettings)
class Typical:
    """Accepts the longest path on which every token passes, then draws a token from the target's distribution.

    Of equally long paths the likeliest is accepted. At temperature 0 only the greedy token passes: greedy decoding.

    Source: Cai et al. 2024, Medusa, arXiv 2401.10774, 2.3.1.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY
    needs = TargetNeeds()

    def __init__(self, settings: TypicalSettings | None = None) -> None:
        self.settings = settings or TypicalSettings()

    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: torch.Generator
    ) -> tuple[list[int], int]:
        threshold_N = self.thresholds(target_probs.whole()).tolist()
        parents = proposal.parents_N.tolist()
        probs = TokenProbs(proposal, target_probs)
        # By accepted node: its depth and the log-probability of its path.
        accepted = {0: (0, 0.0)}
        for node in range(1, len(parents)):
            parent = parents[node]
            if parent in accepted and (chance := probs.of(node)[0]) > threshold_N[parent]:
                depth, log_p = accepted[parent]
                accepted[node] = (depth + 1, log_p + math.log(chance))
        path = [max(accepted, key=lambda node: accepted[node])]
        while path[0]:
            path.insert(0, parents[path[0]])
        return path, draw(target_probs.row(path[-1]), generator)

    def thresholds(self, target_probs_NV: Tensor) -> Tensor:
        """Return the threshold of a token's probability, by row."""
        entropy_N = torch.special.entr(target_probs_NV.double()).sum(dim=-1)
        return (self.settings.delta * torch.exp(-entropy_N)).clamp_max(self.settings.epsilon)
