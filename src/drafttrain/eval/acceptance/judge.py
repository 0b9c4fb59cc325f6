"""Judge: accept a draft token if the lossless rule or a judge accepts it. LOSSY: the output's distribution changes.

N = nodes, V = vocabulary, D = hidden
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Exactness, Proposal
from drafttrain.core.settings import setting
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.verification import RandomDecisions, walk
from drafttrain.heads.folder import load_head
from drafttrain.heads.judge import JudgeHead


@dataclass
class JudgeRuleSettings:
    """Accept what the lossless rule or a judge accepts. Lossy below delta 1."""

    delta: float | None = setting(
        None,
        help="Accept a token that the judge finds good with a probability above this. null: the judge's own threshold; "
        "1: lossless; 0: accept all.",
        ge=0,
        le=1,
    )
    head: str | None = setting(None, help="Folder of a judge; null: the judge that this recipe trains.")


@acceptance_rules.register("judge", JudgeRuleSettings)
class Judge:
    """Where the lossless walk rejects all children of a node, the first child that the judge passes is accepted.

    Source: Bachmann et al. 2025, Judge Decoding, arXiv 2501.19309, 4.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY

    def __init__(self, settings: JudgeRuleSettings) -> None:
        self.settings = settings

    @cached_property
    def head(self) -> JudgeHead:
        """The judge, loaded at its first use."""
        if self.settings.head is None:
            raise CheckpointError("eval.rule.head: null means the judge that the recipe trains. Give a folder here.")
        head = load_head(Path(self.settings.head), kind="judge").head
        assert isinstance(head, JudgeHead)
        return head

    @property
    def needs(self) -> TargetNeeds:
        """The one layer that the judge reads."""
        return TargetNeeds(hidden=(self.head.settings.layer,))

    @torch.no_grad()
    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: torch.Generator
    ) -> tuple[list[int], int | None]:
        assert node_hidden_ND is not None, "the engine passes the layer that `needs` names"
        if node_hidden_ND.shape[-1] != self.head.hidden_size:
            raise CheckpointError(
                f"eval.rule.head: made for a target of width {self.head.hidden_size}, this target has {node_hidden_ND.shape[-1]}"
            )
        delta = float(self.head.delta) if self.settings.delta is None else self.settings.delta
        self.head.to(node_hidden_ND.device)
        good_N = self.head.probability(node_hidden_ND).tolist()
        # A probability can be rounded to exactly 0; at delta 0 such a token is accepted too.
        return walk(
            proposal,
            target_probs,
            RandomDecisions(generator),
            overrule=lambda node: delta == 0 or good_N[node] > delta,
        )
