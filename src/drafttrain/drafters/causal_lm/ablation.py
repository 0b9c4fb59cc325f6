"""Which layers of a target matter least: each is left out, and the target's distribution on texts is compared with its own.

T = tokens of a text, N = its rows that predict labels, D = hidden, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.drafters.causal_lm.cut import without_blocks
from drafttrain.drafters.causal_lm.cut_settings import CutSettings, spread
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.documents import probe
from drafttrain.target_model.logits import head_logits

ROWS_AT_ONCE = 256
"""Rows whose logits exist at once."""


class Ablation:
    """Divergence of the target from itself with some blocks left out, on texts.

    Raises:
        CheckpointError: No text has a label after its first token.
    """

    def __init__(self, target: Target, records: Sequence[Record]) -> None:
        probe(target.model)
        self._target = target
        self._texts = [(tokens_1T, rows_N) for tokens_1T, rows_N in map(_rows, records) if len(rows_N)]
        if not self._texts:
            raise CheckpointError("drafter.cut: no training text has a label on which layers can be compared")
        self._whole = [self._states(*text) for text in self._texts]

    @torch.no_grad()
    def divergence(self, left_out: Collection[int]) -> float:
        """Return KL(target || target without these blocks) in nats, mean over all labels."""
        with without_blocks(self._target.model, left_out):
            found = [self._states(*text) for text in self._texts]
        pairs = zip(self._whole, found, strict=True)
        count = sum(len(states_ND) for states_ND in found)
        return sum(float(self._divergence(*pair)) for pair in pairs) / count

    def _states(self, tokens_1T: Tensor, rows_N: Tensor) -> Tensor:
        seen = self._target.read(tokens_1T, torch.arange(tokens_1T.shape[1])[None], TargetNeeds(final=True))
        assert seen.final_BTD is not None
        return seen.final_BTD[0, rows_N.to(seen.final_BTD.device)]

    def _divergence(self, whole_ND: Tensor, found_ND: Tensor) -> Tensor:
        total = whole_ND.new_zeros((), dtype=torch.float64)
        for whole_nD, found_nD in zip(whole_ND.split(ROWS_AT_ONCE), found_ND.split(ROWS_AT_ONCE), strict=True):
            log_p_nV, log_q_nV = (
                torch.log_softmax(head_logits(self._target.model, states).float(), dim=-1)
                for states in (whole_nD, found_nD)
            )
            total += (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum().double()
        return total


def removed_one_by_one(ablation: Ablation, total: int, count: int) -> Iterator[tuple[int, float]]:
    """Yield (block, divergence) of each removal until `count` of `total` blocks are left: of those left, the one that costs least.

    The divergence is that of all blocks removed so far. Equal ones: the first.
    """
    removed: list[int] = []
    while total - len(removed) > count:
        costs = {block: ablation.divergence([*removed, block]) for block in range(total) if block not in removed}
        cheapest = min(costs, key=lambda block: costs[block])
        removed.append(cheapest)
        yield cheapest, costs[cheapest]


def layers_by_ablation(target: Target, records: Sequence[Record], count: int) -> dict[str, Any]:
    """Return the layers that are left, the removals in their order, and the divergence of evenly spaced layers beside theirs.

    ShortGPT (Men et al. 2024, arXiv 2403.03853) ranks all layers once, by how much each changes its input. Here the cost of a layer is
    measured again after each removal, in the distribution, which is what a drafter is compared by.
    """
    total = len(blocks(target.model))
    CutSettings(layers="first").layer_numbers(total, count)
    ablation, removed = Ablation(target, records), []
    for block, divergence in removed_one_by_one(ablation, total, count):
        removed.append({"layer": block, "kl": divergence})
        say(f"ablation: layer {block} removed, {total - len(removed)} left, KL {divergence:.4f} nats")
    layers = [block for block in range(total) if block not in [one["layer"] for one in removed]]
    even = spread(total, count)
    kl_of_even = ablation.divergence([block for block in range(total) if block not in even])
    kl = removed[-1]["kl"] if removed else 0.0
    say(
        f"the drafter starts from layers {', '.join(map(str, layers))} of the target: KL {kl:.4f} nats to the whole target on "
        f"{len(records)} texts; evenly spaced layers have {kl_of_even:.4f}"
    )
    return {"layers": layers, "kl": kl, "kl_of_evenly_spaced": kl_of_even, "removed": removed}


def _rows(record: Record) -> tuple[Tensor, Tensor]:
    """Return a text, and the positions whose next token is a label."""
    labels_N = torch.tensor(record.loss_mask, dtype=torch.bool)[1:].nonzero()[:, 0]
    return torch.tensor(record.tokens, dtype=torch.long)[None], labels_N
