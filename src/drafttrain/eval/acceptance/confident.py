"""Accept by confidence: a draft is accepted as far as the drafter is sure of it. LOSSY: the output changes.

N = nodes, D = hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from drafttrain.core.proposals import Exactness, Proposal
from drafttrain.core.settings import setting
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.verification import RandomDecisions, walk


@dataclass
class ConfidentSettings:
    """Accept draft tokens that the drafter gave enough probability, without verification. Lossless above 1."""

    threshold: float = setting(0.9, help="Least probability of a draft token, and of all before it.", ge=0)


@acceptance_rules.register("confident", ConfidentSettings)
class Confident:
    """Accepts what the lossless rule accepts, and the draft tokens up to the first that the drafter was less sure of.

    It needs a drafter that knows its confidence in a chain (`lexical_units`, `hamburger`); other drafts are verified without loss.

    Source: Sun et al. 2024, Lexical Unit Decoding, arXiv 2405.15208.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY
    needs = TargetNeeds()

    def __init__(self, settings: ConfidentSettings | None = None) -> None:
        self.settings = settings or ConfidentSettings()

    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: Generator
    ) -> tuple[list[int], int | None]:
        trusted = 0
        for chance in proposal.confidence or ():
            if chance < self.settings.threshold:
                break
            trusted += 1
        return walk(proposal, target_probs, RandomDecisions(generator), overrule=lambda node: node <= trusted)
