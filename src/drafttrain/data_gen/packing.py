"""Packs records side by side into rows: less padding, the same loss.

B = sequences, T = positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.texts import Record


def plan(lengths: Sequence[int], *, width: int) -> list[list[int]]:
    """Return rows of record numbers, each at most `width` tokens: longest record first, into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, left in enumerate(room) if left >= lengths[number]), None)
        if row is None:
            rows.append([])
            room.append(max(width, lengths[number]))
            row = len(rows) - 1
        rows[row].append(number)
        room[row] -= lengths[number]
    return rows


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
    rows = plan([len(record.tokens) for record in records], width=width)
    longest = max(sum(len(records[i].tokens) for i in row) for row in rows)
    longest = max(longest, min(width, -(-longest // multiple) * multiple))
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
        drawn_tokens=[sum(record.loss_mask) if record.drawn_by else 0 for record in records],
    )
    return batch, places


def as_padding(batch: DraftBatch) -> DraftBatch:
    """Return a batch of the same shape in which no position is trained or counted."""
    nowhere_BT = torch.full_like(batch.documents_BT, -1)
    untrained_BT = torch.zeros_like(batch.loss_mask_BT)
    return replace(batch, documents_BT=nowhere_BT, loss_mask_BT=untrained_BT, record_ids=(), drawn_tokens=())
