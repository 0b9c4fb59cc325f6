"""The lossless rule: the output has exactly the target's distribution; at temperature 0 it is exactly the greedy text.

N = nodes, V = vocabulary, D = hidden
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.proposals import Exactness, Proposal
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.verification import RandomDecisions, walk


@dataclass
class LosslessSettings:
    """Keep the output exactly distributed as the target's."""


@acceptance_rules.register("lossless", LosslessSettings)
class Lossless:
    """Speculative sampling, by the walk in eval/verification.py."""

    exactness: ClassVar[Exactness] = Exactness.DISTRIBUTION
    needs = TargetNeeds()

    def __init__(self, settings: LosslessSettings | None = None) -> None:
        self.settings = settings or LosslessSettings()

    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: torch.Generator
    ) -> tuple[list[int], int | None]:
        return walk(proposal, target_probs, RandomDecisions(generator))
