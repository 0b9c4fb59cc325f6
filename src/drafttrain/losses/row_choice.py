"""Which rows a drafter trains, if training all of them would cost too much.

R = slots of the batch, C = slots where a root may be
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.target_rows import ChosenRows
from drafttrain.losses.random_rows import uniform


@dataclass(frozen=True)
class Anchors:
    """Some roots of each document, drawn anew in every step; each with its whole block.

    A root may be wherever its first label is trained. Its block ends before the first label that is not: a draft token after
    it could never be accepted first. Rows are weighted by possible roots / chosen roots of their document, so that the sum is an
    unbiased estimate of the sum over all roots, whose number `DraftBatch.weight_of_step` counts.

    Source: Chen et al. 2026, DFlash, arXiv 2602.06036.
    """

    per_document: int
    """Most roots of a document."""

    def chosen(self, trained: Mapping[int, Tensor], document_R: Tensor, seed_R: Tensor) -> ChosenRows:
        """Choose the roots. The draw of a slot depends on its step, document and position only."""
        depths = sorted(trained)
        candidate_C = trained[depths[0]].nonzero()[:, 0]
        kept_C, scale_C = self._drawn(document_R[candidate_C], seed_R[candidate_C])
        kept_R = torch.zeros_like(trained[depths[0]]).index_put((candidate_C,), kept_C)
        scale_R = torch.ones(len(kept_R), device=kept_R.device).index_put((candidate_C,), scale_C)
        of_depth = {}
        for depth in depths:
            kept_R = kept_R & trained[depth]
            of_depth[depth] = kept_R
        return ChosenRows(of_depth, scale_R, roots_only=True)

    def _drawn(self, document_C: Tensor, seed_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept_C, scale_C): the slots with the smallest random numbers of each document."""
        _, number_C = document_C.unique(return_inverse=True)
        order_C = (number_C + uniform(seed_C, 1)[:, 0]).argsort()
        count_L = number_C.bincount()
        first_L = count_L.cumsum(0) - count_L
        rank_C = torch.empty_like(number_C)
        rank_C[order_C] = torch.arange(len(order_C), device=order_C.device) - first_L[number_C[order_C]]
        scale_C = (count_L / count_L.clamp(max=self.per_document))[number_C]
        return rank_C < self.per_document, scale_C.float()
