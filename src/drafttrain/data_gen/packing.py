"""Packs records side by side into rows: less padding, the same loss.

B = sequences, T = positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.images import PlacedImages
from drafttrain.core.texts import Record


def plan(lengths: Sequence[int], *, width: int) -> list[list[int]]:
    """Return rows of record numbers, each at most `width` tokens or one longer record.

    The longest record goes first, into the first row with room: so there are few rows. If the same number of rows also holds the
    records when each goes into the emptiest row, and the longest row is then shorter, they are arranged so.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rows: list[list[int]] = []
    used: list[int] = []
    for number in longest_first:
        row = next((i for i, tokens in enumerate(used) if tokens + lengths[number] <= width), None)
        if row is None:
            rows.append([])
            used.append(0)
            row = len(rows) - 1
        rows[row].append(number)
        used[row] += lengths[number]
    even: list[list[int]] = [[] for _ in rows]
    of_even = [0] * len(rows)
    for number in longest_first:
        row = of_even.index(min(of_even))
        even[row].append(number)
        of_even[row] += lengths[number]
    return even if max(of_even) < max(used) else rows


def row_length(lengths: Sequence[int], rows: Sequence[Sequence[int]], *, width: int, multiple: int = 1) -> int:
    """Return the tokens of every row, padding included: those of the longest row, rounded up as `pack` says."""
    longest = max(sum(lengths[number] for number in row) for row in rows)
    return max(longest, min(width, -(-longest // multiple) * multiple))


def pack(
    records: Sequence[Record],
    *,
    width: int,
    multiple: int = 1,
    first_document: int = 0,
    weight_of_step: float,
    step: int = 0,
) -> tuple[DraftBatch, list[tuple[int, int]]]:
    """Return a micro-batch, and for each record the (row, column) where it begins.

    Args:
        width: Tokens a row.
        multiple: Rows are padded to a multiple of this length, or to `width`, so that few shapes occur.
        first_document: Number of the first record within the optimizer step.
    """
    lengths = [len(record.tokens) for record in records]
    rows = plan(lengths, width=width)
    longest = row_length(lengths, rows, width=width, multiple=multiple)
    shape = (len(rows), longest)
    tokens_BT = torch.zeros(shape, dtype=torch.long)
    loss_mask_BT = torch.zeros(shape, dtype=torch.bool)
    positions_BT = torch.zeros(shape, dtype=torch.long)
    documents_BT = torch.full(shape, -1, dtype=torch.long)
    places = [(0, 0)] * len(records)
    for row, members in enumerate(rows):
        column = 0
        for number in members:
            record = records[number]
            span = slice(column, column + len(record.tokens))
            tokens_BT[row, span] = torch.tensor(record.tokens)
            loss_mask_BT[row, span] = torch.tensor(record.loss_mask)
            positions_BT[row, span] = torch.arange(len(record.tokens))
            documents_BT[row, span] = first_document + number
            places[number] = (row, column)
            column = span.stop
        # Padding counts up too, so that it is a document of its own.
        positions_BT[row, column:] = torch.arange(longest - column)
    batch = DraftBatch(
        tokens_BT,
        loss_mask_BT,
        positions_BT,
        documents_BT,
        weight_of_step=weight_of_step,
        step=step,
        record_ids=[record.id for record in records],
        images=[
            PlacedImages(*place, record.images) for place, record in zip(places, records, strict=True) if record.images
        ],
        drawn_tokens=[sum(record.loss_mask) if record.drawn_by else 0 for record in records],
    )
    return batch, places


def as_padding(batch: DraftBatch) -> DraftBatch:
    """Return a batch of the same shape in which no position is trained or counted."""
    nowhere_BT = torch.full_like(batch.documents_BT, -1)
    untrained_BT = torch.zeros_like(batch.loss_mask_BT)
    return replace(
        batch,
        documents_BT=nowhere_BT,
        loss_mask_BT=untrained_BT,
        record_ids=(),
        drawn_tokens=(),
        altered=batch.altered and batch.altered.as_padding(),
    )
