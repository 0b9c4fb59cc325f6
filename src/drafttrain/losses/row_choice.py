"""Which rows a drafter trains, if training all of them would cost too much.

R = slots of the batch, C = slots where a root may be, L = documents
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
    """Some roots of each document, drawn again in every step; each with its whole block.

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
        return ChosenRows(of_depth, scale_R, states="roots")

    def _drawn(self, document_C: Tensor, seed_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return (kept_C, scale_C): the slots with the smallest random numbers of each document."""
        _, number_C = document_C.unique(return_inverse=True)
        count_L = number_C.bincount()
        most_L = count_L.clamp(max=self.per_document)
        return _drawn(number_C, seed_C, most_L), (count_L / most_L)[number_C].float()


@dataclass(frozen=True)
class DroppedDepths:
    """Fewer rows at each further depth: conditional drop-on-depth.

    Depth 1 has all rows. Of a document with n of them, depth d + 1 has at most int((n - d) max(ratio^d, least)), drawn again in every
    step among the rows that depth d has and whose label is trained. So each row has its first depths, up to some one.

    Every row counts the same: a loss is the sum over the rows of all depths.

    Source: P-EAGLE, in vLLM's speculators; there a row may have depth 2 without depth 1.
    """

    ratio: float = 0.7
    least: float = 0.2

    def most(self, rows: int, depth: int) -> int:
        """Return the most rows that a document has at a depth.

        Args:
            rows: Its rows of depth 1.
        """
        return int(max(0, rows - depth + 1) * max(self.ratio ** (depth - 1), self.least))

    def chosen(self, trained: Mapping[int, Tensor], document_R: Tensor, seed_R: Tensor) -> ChosenRows:
        """Choose the rows. The draw of a row depends on its step, document and position only."""
        first, *further = sorted(trained)
        _, number_R = document_R.unique(return_inverse=True)
        counts = number_R[trained[first]].bincount(minlength=int(number_R.max()) + 1).tolist()
        of_depth = {first: trained[first]}
        for depth in further:
            pool_C = (of_depth[depth - 1] & trained[depth]).nonzero()[:, 0]
            # The same numbers at every depth: the smallest of a pool are a uniform draw from it, and so are those of them.
            most_L = torch.tensor([self.most(rows, depth) for rows in counts], device=pool_C.device)
            kept_C = _drawn(number_R[pool_C], seed_R[pool_C], most_L)
            of_depth[depth] = torch.zeros_like(trained[depth]).index_put((pool_C,), kept_C)
        return ChosenRows(of_depth, states="rows")


def _drawn(number_C: Tensor, seed_C: Tensor, most_L: Tensor) -> Tensor:
    """Return kept_C: the slots with the smallest random numbers of each document.

    Args:
        number_C: Of the document of each slot.
        most_L: The most that a document keeps.
    """
    order_C = (number_C + uniform(seed_C, 1)[:, 0]).argsort()
    count_L = number_C.bincount(minlength=len(most_L))
    first_L = count_L.cumsum(0) - count_L
    rank_C = torch.empty_like(number_C)
    rank_C[order_C] = torch.arange(len(order_C), device=order_C.device) - first_L[number_C[order_C]]
    return rank_C < most_L[number_C]
