"""Lenience: accept more of the tokens to which the drafter gives too much probability. LOSSY: the distribution changes.

N = nodes, V = vocabulary, D = hidden
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from drafttrain.core.proposals import Exactness, Proposal
from drafttrain.core.settings import setting
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.eval.acceptance import acceptance_rules
from drafttrain.eval.verification import RandomDecisions, walk


@dataclass
class LenienceSettings:
    """Accept with chance min(1, f(p) / q). Lossy below epsilon 1."""

    form: Literal["linear", "square", "exponent"] = setting(
        "linear", help="f(p): linear p / epsilon, square p / epsilon^2, exponent p^epsilon."
    )
    epsilon: float = setting(0.5, help="1 is lossless; smaller values accept more.", gt=0, le=1)


@acceptance_rules.register("lenience", LenienceSettings)
class Lenience:
    """Lossy acceptance. After a rejection a token is drawn from norm(max(p - q, 0)), the residual of the lossless rule.

    Source: Zhou et al. 2023, DistillSpec, arXiv 2310.08461; the residual is this project's choice.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY
    needs = TargetNeeds()

    def __init__(self, settings: LenienceSettings | None = None) -> None:
        self.settings = settings or LenienceSettings()

    def __call__(
        self, proposal: Proposal, target_probs: TargetProbs, node_hidden_ND: Tensor | None, generator: torch.Generator
    ) -> tuple[list[int], int | None]:
        credit = None if self.settings.epsilon == 1 else lenient(self.settings.form, self.settings.epsilon)
        return walk(proposal, target_probs, RandomDecisions(generator), credit=credit)


def lenient(form: str, epsilon: float) -> Callable[[float], float]:
    """Return f, which raises the target's probability of a token."""
    forms: dict[str, Callable[[float], float]] = {
        "linear": lambda p: p / epsilon,
        "square": lambda p: p / epsilon**2,
        "exponent": lambda p: p**epsilon,
    }
    return forms[form]
