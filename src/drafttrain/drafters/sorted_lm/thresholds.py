"""Thresholds of the exits for a target: those that draft fastest on held-out texts of it.

N = labels, E = exits, the last layer included
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.loss_rows import LossRows
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.drafters.drafter import Drafter
from drafttrain.losses import Loss
from drafttrain.losses.align import align
from drafttrain.losses.chunked import row_losses
from drafttrain.target_model import Target

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NEVER = 2.0
"""A threshold that no probability reaches."""
LONGEST = 8
"""Draft tokens of a round at most, in the estimate."""


@dataclass(frozen=True)
class ExitRows:
    """What the exits give at the labels of held-out texts, in the order of the texts."""

    largest_NE: Tensor
    """The largest probability of each exit."""
    rate_NE: Tensor
    """The acceptance rate of each exit."""
    left_N: Tensor
    """Labels of the same text from this one on."""


@dataclass(frozen=True)
class DraftCosts:
    """What a draft token costs, in target calls."""

    layers: Sequence[float]
    """Of the layers before each exit, all together."""
    head: float
    """Of the head, once for each exit that is asked."""

    def at(self, thresholds: Sequence[float]) -> list[float]:
        """Return the cost of a token from each exit. One that is never confident is not asked, unless it is the last."""
        asked = [threshold <= 1 for threshold in thresholds[:-1]] + [True]
        return [layers + self.head * sum(asked[: place + 1]) for place, layers in enumerate(self.layers)]


class _Largest(Loss):
    """The largest probability of the drafter, in the place of a loss."""

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        return {"loss": rows.q_NV.max(dim=-1).values}


@torch.no_grad()
def exit_rows(drafter: Drafter, target: Target, batches: Iterable[DraftBatch]) -> ExitRows:
    """Return the rows of all exits on texts of the target."""
    parts = []
    for batch in batches:
        seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
        read = replace(batch, target=seen, target_rows=target.rows_of(seen))
        drafted = drafter(read)
        exits: list[DraftOutput] = [*(one.drafted for one in drafted.beside), drafted]
        rows = align(drafted, read)
        found = [row_losses(_Largest(), one, rows, read, vocab_size=target.num_tokens) for one in exits]
        rates = [rate_N for _, rate_N in found if rate_N is not None]
        _, count_S = rows.index.sequence_N.unique_consecutive(return_counts=True)
        left_N = torch.cat([torch.arange(int(count), 0, -1) for count in count_S])
        parts.append((torch.stack([one for one, _ in found], 1).cpu(), torch.stack(rates, 1).cpu(), left_N))
    largest, rate, left = zip(*parts, strict=True)
    return ExitRows(torch.cat(largest).double(), torch.cat(rate).double(), torch.cat(left))


def estimated_rate(rows: ExitRows, thresholds: Sequence[float], costs: DraftCosts) -> float:
    """Return the tokens per cost of a target call, over rounds that begin at each label.

    A round drafts `LONGEST` tokens, or until no exit is confident or the text ends. Its draft tokens are those of the text, which is
    what matters: those after a rejected one are not emitted, only paid for.

    Args:
        thresholds: Of each exit.
    """
    confident_NE = rows.largest_NE >= torch.tensor(thresholds, dtype=rows.largest_NE.dtype)
    drafts_N = confident_NE.any(dim=1)
    # The first exit that is confident; the last one where none is.
    chosen_N = torch.where(drafts_N, confident_NE.to(torch.uint8).argmax(dim=1), len(thresholds) - 1)
    rate_N = rows.rate_NE.gather(1, chosen_N[:, None])[:, 0]
    cost_N = torch.tensor(costs.at(thresholds), dtype=rate_N.dtype)[chosen_N]
    reached_N, drafting_N = torch.ones_like(rate_N), torch.ones_like(drafts_N)
    tokens, cost = float(len(rate_N)), float(len(rate_N))
    place_N = torch.arange(len(rate_N))
    for step in range(LONGEST):
        here_N = (place_N + step).clamp_max(len(rate_N) - 1)
        asked_N = drafting_N & (rows.left_N > step)
        drafting_N = asked_N & drafts_N[here_N]
        reached_N = reached_N * rate_N[here_N] * drafting_N
        tokens += float(reached_N.sum())
        cost += float((cost_N[here_N] * asked_N).sum())
    return tokens / cost


def chosen_thresholds(rows: ExitRows, costs: DraftCosts) -> tuple[list[float], float]:
    """Return the thresholds with the best estimated rate, and that rate.

    From each single exit that always drafts, one threshold at a time is improved on the grid. So no single exit has a better estimate.
    """
    count = len(costs.layers)
    found: list[tuple[float, list[float]]] = []
    for always in range(count):
        best = [NEVER] * always + [0.0] * (count - always)
        rate = estimated_rate(rows, best, costs)
        improves = True
        while improves:
            tried = [[*best[:place], one, *best[place + 1 :]] for place in range(count) for one in (*GRID, NEVER)]
            rates = [estimated_rate(rows, one, costs) for one in tried]
            improves = max(rates) > rate + 1e-9
            if improves:
                rate = max(rates)
                best = tried[rates.index(rate)]
        found.append((rate, best))
    rate, best = max(found)
    return best, rate
