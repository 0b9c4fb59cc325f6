"""Which size and how many tokens a training budget should buy, by the memory-bound speed-up that the fitted form predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drafttrain.core.errors import DataError
from drafttrain.eval.scaling.fit import Scaling

FLOPS_A_TOKEN = 6
"""Operations of a training step per parameter and token: two forward, four backward."""
SIZES = 200
"""Sizes that are tried between the smallest and the largest measured one."""


@dataclass(frozen=True)
class Plan:
    """A drafter that a budget can train."""

    parameters: float
    tokens: float
    block_efficiency: float
    mbsu: float


def best_for(
    scaling: Scaling,
    budget: float,
    *,
    costs: Sequence[tuple[float, float]],
    parameters: tuple[float, float],
    tokens: tuple[float, float],
) -> Plan:
    """Return the size and tokens of the highest predicted memory-bound speed-up, tau / (1 + cost of drafting).

    Args:
        scaling: Of `parameters` and `tokens`.
        budget: FLOPs of the training: 6 per parameter and token.
        costs: (parameters, bytes that the drafts of a round read / bytes of a plain call) of runs; a line is fitted.
        parameters, tokens: The measured ranges: nothing outside is planned.

    Raises:
        DataError: The budget is outside of what was measured.
    """
    sizes, fractions = np.array(costs, dtype=np.float64).T
    slope, fixed = np.polyfit(sizes, fractions, 1)
    plans = []
    for size in np.geomspace(*parameters, SIZES):
        affordable = budget / (FLOPS_A_TOKEN * size)
        if not tokens[0] <= affordable <= tokens[1]:
            continue
        tau = scaling.predict({"parameters": size, "tokens": affordable})
        plans.append(Plan(size, affordable, tau, tau / (1 + max(0.0, fixed + slope * size))))
    if not plans:
        low, high = (FLOPS_A_TOKEN * size * count for size, count in zip(parameters, tokens, strict=True))
        raise DataError(
            f"--budget {budget:g}: no measured size can read a measured number of tokens with it; the runs cost {low:.3g} to "
            f"{high:.3g} FLOPs. Give a budget between these, or measure further runs"
        )
    return max(plans, key=lambda one: one.mbsu)
