"""Calibrates predictions of acceptance on held-out text: a temperature for each slot, from left to right.

N = roots, K = draft tokens of a block, R = slots of a batch
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.calibration import ece
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters.drafter import Drafter
from drafttrain.losses.align import align
from drafttrain.losses.chunked import row_losses
from drafttrain.losses.tvd import TVD
from drafttrain.target_model import Target

FILE = "confidence.json"
"""The temperatures, next to config.json. Serving engines ignore this file."""

GRID = tuple(2 ** (step / 8) for step in range(-16, 17))
"""Temperatures that are tried: 1/4 to 4."""


def calibrated_temperatures(scores_NK: Tensor, rates_NK: Tensor) -> list[float]:
    """Return the temperature of each slot that minimizes the calibration error of prod_{j<=s} c_j, slot by slot.

    Args:
        scores_NK: The predicted logits; nan where a block ends before the slot.
        rates_NK: The acceptance rates.

    Source: DSpark, DeepSeek-AI 2026, DeepSpec repository, DSpark_paper.pdf.
    """
    passed_N, truth_N = (np.ones(len(scores_NK)) for _ in range(2))
    found = []
    for score_N, rate_N in zip(scores_NK.double().unbind(1), rates_NK.double().numpy().T, strict=True):
        there_N = ~torch.isnan(score_N).numpy()
        truth_N = truth_N * rate_N

        def predicted(temperature: float, score_N: Tensor = score_N, passed_N: Any = passed_N) -> Any:
            return passed_N * torch.sigmoid(score_N / temperature).numpy()

        errors = [ece(predicted(one)[there_N], truth_N[there_N]) for one in GRID] if there_N.any() else []
        # Of equal errors, the one nearest to 1.
        order = sorted(range(len(errors)), key=lambda place: (errors[place], abs(np.log(GRID[place]))))
        found.append(GRID[order[0]] if order else 1.0)
        passed_N = predicted(found[-1])
    return found


@torch.no_grad()
def predictions(drafter: Drafter, target: Target, batches: Iterable[DraftBatch]) -> tuple[Tensor, Tensor]:
    """Return (scores_NK, rates_NK) of a block at every root of held-out text; nan where the text ends."""
    scores, rates = [], []
    for batch in batches:
        seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
        read = replace(batch, target=seen, target_rows=target.rows_of(seen))
        drafted = drafter(read)
        rows = align(drafted, read)
        _, rate_N = row_losses(TVD(), drafted, rows, read, vocab_size=target.num_tokens)
        assert rate_N is not None, "the loss compares with the target"
        place = (rows.drafter_N, rows.index.depth_N - 1)
        of_depth = torch.stack([drafted.confidence_BT[depth].flatten() for depth in sorted(drafted.confidence_BT)], 1)
        rate_RK = torch.full_like(of_depth, torch.nan, dtype=torch.float64).index_put(place, rate_N.double())
        # A block ends before its first label that is not trained.
        there_RK = (~rate_RK.isnan()).cumprod(dim=1).bool()
        kept_R = there_RK[:, 0]
        scores.append(of_depth.double().masked_fill(~there_RK, torch.nan)[kept_R].cpu())
        rates.append(rate_RK.masked_fill(~there_RK, torch.nan)[kept_R].cpu())
    return torch.cat(scores), torch.cat(rates)


def read_temperatures(folder: Path, *, count: int) -> list[float]:
    """Return the calibrated temperatures of a drafter folder; 1 where it has none.

    Raises:
        CheckpointError: The file holds something else.
    """
    path = folder / FILE
    if not path.exists():
        return [1.0] * count
    held = read_json(path).get("temperatures")
    if not isinstance(held, list) or len(held) != count or not all(isinstance(t, float) and t > 0 for t in held):
        raise CheckpointError(f"{path}: temperatures must be {count} numbers above 0, got {held}")
    return held
