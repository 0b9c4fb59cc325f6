"""Segments of a text by entropy: a token joins the segment before it where the target is sure of it.

B = texts, T = tokens of the longest one, N = rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from drafttrain.core.altered_text import Alteration
from drafttrain.core.errors import DataError
from drafttrain.core.texts import Record
from drafttrain.drafters.text_notes import Notes, TextNotes, logits_of
from drafttrain.target_model import Target

ALONE = 0
"""Beside the first token of a segment, and beside every token that is no label: it is a segment by itself."""
ROWS_AT_ONCE = 2048


class Segments(TextNotes):
    """Marks segments: beside a token is its place in its segment, from 0. Labels alone share a segment.

    A token joins the segment before it if that has room, and if H < `low` or H < `ratio` * (the largest H in the segment), with H the
    entropy of the target's distribution of the token.

    Args:
        size: Most tokens of a segment.
        low: Nats.

    Source: Liu et al. 2025, HAMburger, arXiv 2505.20438; the rule is the one that their code calls decreasing, second version.
    """

    name: ClassVar[str] = "segments"

    def __init__(self, size: int, low: float, ratio: float) -> None:
        self.size = size
        self.low = low
        self.ratio = ratio

    @property
    def columns(self) -> int:
        """The place in the segment."""
        return 1

    def about(self) -> dict[str, Any]:
        """Return the numbers of the rule."""
        return {"size": self.size, "low": self.low, "ratio": self.ratio}

    @torch.no_grad()
    def of(self, records: Sequence[Record], target: Target, *, seed: int) -> list[Notes]:
        """Return the place of every token in its segment."""
        found: list[Notes] = []
        for record, parts in zip(records, logits_of(records, target), strict=True):
            entropies = [0.0]
            for logits_NV in parts:
                log_NV = logits_NV.log_softmax(dim=-1)
                entropies += (-(log_NV.exp() * log_NV).sum(dim=-1)).tolist()
            places = places_in_segments(record.loss_mask, entropies, size=self.size, low=self.low, ratio=self.ratio)
            found.append(np.array(places, np.int32)[:, None])
        return found

    def altered(self, record: Record, notes_TC: Notes, *, seed: int) -> Alteration:
        """Return the text as it is, and the positions whose segment goes on after them. Each token that joins is one label."""
        places: list[int] = notes_TC[:, 0].tolist()
        before = [place - 1 for place, own in enumerate(places) if own != ALONE]
        return Alteration(record.tokens, record.tokens, before, weight=1.0)

    def summary(self, records: Sequence[Record], notes: Sequence[Notes]) -> str:
        """Return how many segments the labels have, and how long they are.

        Raises:
            DataError: No segment has two tokens.
        """
        labels = sum(sum(record.loss_mask) for record in records)
        joined = sum(int((notes_TC != ALONE).sum()) for notes_TC in notes)
        if not joined:
            raise DataError(
                f"segments: no label joins the one before it: the target is not sure enough of any. Raise drafter.low_entropy "
                f"({self.low:g} nats) or drafter.entropy_ratio ({self.ratio:g}), or train on texts that the target writes itself "
                "(data.generate)"
            )
        segments = labels - joined
        return f"segments: {segments:,} of {labels / segments:.2f} tokens in the mean, {self.size} at most"


def places_in_segments(
    loss_mask: Sequence[bool], entropies: Sequence[float], *, size: int, low: float, ratio: float
) -> list[int]:
    """Return the place of every token in its segment; `ALONE` where it is no label.

    Args:
        entropies: Of the distribution of each token, nats.
    """
    places: list[int] = []
    largest, open_segment = 0.0, False
    for number, (label, entropy) in enumerate(zip(loss_mask, entropies, strict=True)):
        joins = label and open_segment and places[-1] + 1 < size and (entropy < low or entropy < ratio * largest)
        places.append(places[-1] + 1 if joins else ALONE)
        largest = max(largest, entropy) if joins else entropy
        open_segment = label and number > 0
    return places
