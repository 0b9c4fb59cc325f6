"""The only place that shifts: which row of a drafter predicts which token.

B = sequences, T = positions, D = hidden, K = depths, R = slots of the batch (B T), N = rows, A = chosen roots,
U = positions of the target that rows read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.core.batches import DraftBatch, DraftOutput, PackedDocuments, Plan, ReadSlots, shape_of
from drafttrain.core.target_rows import AlignedRows, ChosenRows, RowIndex, RowsAsked


def align(drafted: DraftOutput, batch: DraftBatch, *, block_length: int = 1) -> AlignedRows:
    """Return the rows of all depths whose label is trained: from the batch's plan if it has them, else computed here.

    Row t of depth d predicts token t + d + lag of the same document; the target predicts that token at position
    t + d + lag - 1. `loss_mask_BT` is read at the label.

    Args:
        block_length: Rows of a drafter of depth 1 that form one block.
    """
    return rows_of(batch, RowsAsked(tuple(sorted(drafted.states_BTD)), drafted.lag, block_length, drafted.choice))


def rows_of(batch: DraftBatch, asked: RowsAsked) -> AlignedRows:
    """Return the requested rows: from the batch's plan if it has them, else computed here."""
    planned_rows = batch.plan and batch.plan.rows.get(asked)
    return planned_rows or _rows(batch, asked)


def chosen_slots(batch: DraftBatch, asked: RowsAsked) -> Tensor:
    """Return slots_A, the flat slot b * T + t of every root whose states a drafter computes for a choice of roots."""
    slots_A = rows_of(batch, asked).slots_A
    assert slots_A is not None, "the choice is one of roots"
    return slots_A


def chosen_rows(batch: DraftBatch, asked: RowsAsked) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, by depth, the flat slots b * T + t of the rows: on the device of the batch, and on the CPU."""
    rows = rows_of(batch, asked)
    counts = list(rows.counts.values())
    parts = zip(rows.target_N.split(counts), rows.targets_on_host.split(counts), strict=True)
    # Row t of depth d reads the target at position t + d + lag - 1.
    return {
        depth: (target_n - (depth + asked.lag - 1), on_host - (depth + asked.lag - 1))
        for depth, (target_n, on_host) in zip(rows.counts, parts, strict=True)
    }


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
    trained = {depth: _trained(batch, depth + asked.lag) for depth in asked.depths}
    chosen = ChosenRows(trained)
    if asked.choice is not None:
        chosen = asked.choice.chosen(trained, batch.documents_BT.flatten(), batch.seed_BT.flatten())
    roots = {depth: trained_R.nonzero()[:, 0] for depth, trained_R in chosen.trained.items()}
    root_N = torch.cat(list(roots.values()))
    depth_N = torch.cat([torch.full_like(found_n, depth) for depth, found_n in roots.items()])
    label_N = root_N + depth_N + asked.lag
    target_N = label_N - 1
    slots_A = _slots(root_N) if chosen.states == "roots" else None
    # Without a choice, a position that one depth reads is read by all lower depths.
    read_U = target_N[: len(roots[asked.depths[0]])] if asked.choice is None else target_N.unique()
    sequence_N = batch.documents_BT.flatten()[label_N]
    position_N = batch.positions_BT.flatten()[label_N]
    seed_N = (batch.step * 1_000_003 + sequence_N) * (1 << 26) + position_N * 64 + depth_N
    return AlignedRows(
        drafter_N=_places(root_N, roots, slots_A, chosen),
        target_N=target_N,
        tokens_N=batch.tokens_BT.flatten()[label_N],
        seed_N=seed_N,
        index=_index(batch, asked, sequence_N, position_N, depth_N),
        counts={depth: len(found_n) for depth, found_n in roots.items()},
        read_U=read_U,
        targets_on_host=target_N.cpu(),
        read_on_host=read_U.cpu(),
        slots_A=slots_A,
        scale_N=None if chosen.scale_R is None else chosen.scale_R[root_N],
    )


def _places(root_N: Tensor, roots: Mapping[int, Tensor], slots_A: Tensor | None, chosen: ChosenRows) -> Tensor:
    """Return the place of each row's state among those that the drafter computes of its depth."""
    if chosen.states == "rows":
        return torch.cat([torch.arange(len(found_n), device=root_N.device) for found_n in roots.values()])
    return root_N if slots_A is None else torch.searchsorted(slots_A, root_N)


def _slots(root_N: Tensor) -> Tensor:
    # A process without trained rows runs the same modules as the others, on the smallest input.
    return root_N.unique() if len(root_N) else root_N.new_zeros(1)


def _index(batch: DraftBatch, asked: RowsAsked, sequence_N: Tensor, position_N: Tensor, depth_N: Tensor) -> RowIndex:
    # One block: the depths of one root, or a window of successive positions of a chain.
    root_N, several = position_N - depth_N, len(asked.depths) > 1
    if not several:
        root_N, depth_N = position_N // asked.block_length, position_N % asked.block_length + 1
    return RowIndex(
        sequence_N=sequence_N,
        depth_N=depth_N,
        block_N=sequence_N * (1 << 32) + root_N,
        step=batch.step,
        deepest=max(asked.depths) if several else asked.block_length,
    )


def _trained(batch: DraftBatch, shift: int) -> Tensor:
    """Return trained_R: whether the label `shift` places after each flat slot is trained and in the same document."""
    length, documents_BT = batch.tokens_BT.shape[1], batch.documents_BT
    same_BT = documents_BT[:, shift:] == documents_BT[:, : max(length - shift, 0)]
    trained_BT = batch.loss_mask_BT[:, shift:] & same_BT & (documents_BT[:, shift:] >= 0)
    return pad(trained_BT, (0, length - trained_BT.shape[1])).flatten()
