"""Lexical units of a text: spans in which the target is sure of every token but the first.

B = texts, T = tokens of the longest one, N = rows
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch

from drafttrain.core.altered_text import Alteration
from drafttrain.core.errors import DataError
from drafttrain.core.texts import Record
from drafttrain.drafters.text_notes import Notes, TextNotes, logits_of
from drafttrain.target_model import Target

NOTHING = -1
"""Beside a token that is no label."""
ROWS_AT_ONCE = 2048


class LexicalUnits(TextNotes):
    """Marks units: beside a label is its place in its unit, from 0. A token continues the unit before it if the target gives it a
    probability of at least `threshold`; the first token of a unit is free. So units are maximal, disjoint, and hold all labels.

    Args:
        ahead: Look-ahead tokens, at most.
        token: Id of the look-ahead token.

    Source: Sun et al. 2024, Lexical Unit Decoding, arXiv 2405.15208, 3.
    """

    name: ClassVar[str] = "units"

    def __init__(self, threshold: float, ahead: int, token: int) -> None:
        self.threshold = threshold
        self.ahead = ahead
        self.token = token

    @property
    def columns(self) -> int:
        """The place in the unit."""
        return 1

    def about(self) -> dict[str, Any]:
        """Return the threshold."""
        return {"threshold": self.threshold}

    @torch.no_grad()
    def of(self, records: Sequence[Record], target: Target, *, seed: int) -> list[Notes]:
        """Return the place of every label in its unit."""
        found: list[Notes] = []
        for record, parts in zip(records, logits_of(records, target), strict=True):
            sure = [False]
            for logits_NV in parts:
                labels = record.tokens[len(sure) : len(sure) + len(logits_NV)]
                labels_N1 = torch.tensor(labels, dtype=torch.long, device=logits_NV.device)[:, None]
                sure += (logits_NV.softmax(dim=-1).gather(1, labels_N1)[:, 0] >= self.threshold).tolist()
            found.append(np.array(places_in_units(record.loss_mask, sure), np.int32)[:, None])
        return found

    def altered(self, record: Record, notes_TC: Notes, *, seed: int) -> Alteration:
        """Return the text with look-ahead tokens in one random unit, at which all tokens of it but the first are predicted."""
        units = [unit for unit in units_of(notes_TC[:, 0].tolist()) if len(unit) > 1]
        if not units:
            return Alteration(record.tokens, record.tokens, [])
        unit = Random(seed).choice(units)[: self.ahead + 1]
        read = list(record.tokens)
        # The state of a position predicts the token after it: all but the last.
        places = list(unit[:-1])
        for place in places:
            read[place] = self.token
        return Alteration(record.tokens, read, places)

    def summary(self, records: Sequence[Record], notes: Sequence[Notes]) -> str:
        """Return how many units there are, and how long they are.

        Raises:
            DataError: No unit has a second token.
        """
        units = [unit for notes_TC in notes for unit in units_of(notes_TC[:, 0].tolist())]
        several = [unit for unit in units if len(unit) > 1]
        if not several:
            raise DataError(
                f"units: the target gives no label a probability of {self.threshold:g}, so no unit has two tokens: lower "
                "drafter.threshold, or train on texts that the target writes itself (data.generate)"
            )
        tokens = sum(map(len, units))
        return (
            f"units: {len(units):,} of {tokens / len(units):.2f} tokens in the mean, {len(several):,} of them with at least two; "
            f"{sum(map(len, several)) / tokens:.0%} of the labels are in those"
        )


def places_in_units(loss_mask: Sequence[bool], sure: Sequence[bool]) -> list[int]:
    """Return the place of every token in its unit; `NOTHING` where it is no label.

    Args:
        sure: By token, whether the target gives it at least the threshold.
    """
    places: list[int] = []
    for number, label in enumerate(loss_mask):
        if not label or number == 0:
            places.append(NOTHING)
        else:
            before = places[-1]
            places.append(before + 1 if sure[number] and before != NOTHING else 0)
    return places


def units_of(places: Sequence[int]) -> list[range]:
    """Return the units as ranges of positions."""
    starts = [number for number, place in enumerate(places) if place == 0]
    units = []
    for start in starts:
        stop = start + 1
        while stop < len(places) and places[stop] == stop - start:
            stop += 1
        units.append(range(start, stop))
    return units
