"""Early exit of Jacobi decoding: a chain is accepted whole before it has converged. LOSSY: the output changes.

N = nodes, V = vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.probability import likeliest
from drafttrain.core.proposals import Exactness, Proposal
from drafttrain.core.settings import setting
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.verification import RandomDecisions, walk

NEEDS_ITERATES = "jacobi_exit ends an iteration, so it needs drafts of drafter.kind consistency or of proposer jacobi"
INSTEAD = "use rule: {kind: lossless}"


@dataclass
class JacobiExitSettings:
    """Accept a Jacobi iterate that hardly changes. Lossy unless max_changed is 0 and max_rounds null."""

    max_changed: int = setting(
        1, help="Accept all draft tokens where the next iterate changes at most this many of them; 0: none.", ge=0
    )
    max_rounds: int | None = setting(
        None, help="Accept all draft tokens in this round of a chain, whatever changes; null: never.", ge=1
    )


@acceptance_rules.register("jacobi_exit", JacobiExitSettings)
class JacobiExit:
    """Accepts as the lossless rule; where the iteration stops, also the tokens that it rejects.

    Drafts that are no iterates of Jacobi decoding are refused with a CheckpointError.

    Source: Song et al. 2025, CEED-VLA, arXiv 2506.13725.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY
    needs = TargetNeeds()

    def __init__(self, settings: JacobiExitSettings | None = None) -> None:
        self.settings = settings or JacobiExitSettings()

    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: torch.Generator
    ) -> tuple[list[int], int | None]:
        if proposal.refined is None and len(proposal.tokens_N) > 1:
            raise CheckpointError(f"eval.rule: {NEEDS_ITERATES}, and these drafts are no iterates: {INSTEAD}")
        last = self.settings.max_rounds is not None and (proposal.refined or 0) + 1 >= self.settings.max_rounds
        stops = last or num_changed(proposal, target_probs) <= self.settings.max_changed
        return walk(proposal, target_probs, RandomDecisions(generator), overrule=lambda node: stops)


def num_changed(proposal: Proposal, target_probs: TargetProbs) -> int:
    """Return how many draft tokens are not the target's likeliest after the node before them."""
    next_N = likeliest(target_probs.whole()).cpu()
    return int((next_N[proposal.parents_N[1:]] != proposal.tokens_N[1:]).sum())
