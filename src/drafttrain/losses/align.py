"""The only place that shifts: which row of a drafter predicts which token.

B = sequences, T = positions, D = hidden, K = depths, N = rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput, PackedDocuments, Plan, ReadSlots, shape_of
from drafttrain.core.target_rows import AlignedRows, RowIndex, RowsAsked


def align(drafted: DraftOutput, batch: DraftBatch, *, block_length: int = 1) -> AlignedRows:
    """Return the rows of all depths whose label is trained: from the batch's plan if it has them, else computed here.

    Row t of depth d predicts token t + d + lag of the same document; the target predicts that token at position
    t + d + lag - 1. `loss_mask_BT` is read at the label.

    Args:
        block_length: Rows of a drafter of depth 1 that form one block.
    """
    asked = RowsAsked(tuple(sorted(drafted.states_BTD)), drafted.lag, block_length)
    planned_rows = batch.plan and batch.plan.rows.get(asked)
    return planned_rows or _rows(batch, asked)


def read_slots(batch: DraftBatch, asked: RowsAsked) -> ReadSlots:
    """Return the slots that a drafter must compute for these rows: from the batch's plan if it has them, else computed here."""
    planned_slots = batch.plan and batch.plan.slots.get(asked)
    return planned_slots or ReadSlots.of(_rows(batch, asked).drafter_N, batch.positions_BT)


def planned(batch: DraftBatch, asked: Sequence[RowsAsked], *, slots: bool = False) -> DraftBatch:
    """Return a batch with its plan. Call it on the host: on a GPU the host would wait for the rows of each depth.

    Args:
        slots: Also plan the slots that a drafter computes for the first of these rows.
    """
    rows = {one: _rows(batch, one) for one in dict.fromkeys(asked)}
    of_loss = asked[:1] if slots else []
    needed = {replace(one, block_length=1): ReadSlots.of(rows[one].drafter_N, batch.positions_BT) for one in of_loss}
    plan = Plan(
        shape=shape_of(batch),
        documents=PackedDocuments.of(batch.positions_BT),
        rows=rows,
        slots=needed,
    )
    return replace(batch, plan=plan)


def _rows(batch: DraftBatch, asked: RowsAsked) -> AlignedRows:
    depths = asked.depths
    parts = [_of_depth(batch, depth, depth + asked.lag) for depth in depths]
    drafter_N, label_N, depth_N = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    sequence_N = batch.documents_BT.flatten()[label_N]
    position_N = batch.positions_BT.flatten()[label_N]
    seed_N = (batch.step * 1_000_003 + sequence_N) * (1 << 26) + position_N * 64 + depth_N
    # One block: the depths of one root, or a window of successive positions of a chain.
    root_N = position_N - depth_N
    if len(depths) == 1:
        root_N, depth_N = position_N // asked.block_length, position_N % asked.block_length + 1
    return AlignedRows(
        drafter_N=drafter_N,
        target_N=label_N - 1,
        tokens_N=batch.tokens_BT.flatten()[label_N],
        seed_N=seed_N,
        index=RowIndex(
            sequence_N=sequence_N,
            depth_N=depth_N,
            block_N=sequence_N * (1 << 32) + root_N,
            step=batch.step,
            deepest=max(depths) if len(depths) > 1 else asked.block_length,
        ),
        counts={depth: len(part[0]) for depth, part in zip(depths, parts, strict=True)},
        targets_on_host=(label_N - 1).cpu(),
    )


def _of_depth(batch: DraftBatch, depth: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (flat drafter position, flat label position, depth) of one depth's trained rows."""
    length = batch.tokens_BT.shape[1]
    documents_BT = batch.documents_BT
    same_BT = documents_BT[:, shift:] == documents_BT[:, : max(length - shift, 0)]
    trained_BT = batch.loss_mask_BT[:, shift:] & same_BT & (documents_BT[:, shift:] >= 0)
    row_N, column_N = trained_BT.nonzero(as_tuple=True)
    drafter_N = row_N * length + column_N
    return drafter_N, drafter_N + shift, torch.full_like(row_N, depth)
