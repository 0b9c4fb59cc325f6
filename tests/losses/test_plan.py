"""What is planned of a batch on the host is what would be found on the device, and goes there with it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.target_rows import AlignedRows, RowsAsked, TargetOutput
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.losses.align import align, planned
from drafttrain.target_model import Target


def batch_of(seed: int) -> DraftBatch:
    """Return texts of many lengths side by side, trained in places."""
    draws = random.Random(seed)
    records = []
    for number in range(6):
        tokens = [draws.randrange(257) for _ in range(draws.randrange(1, 12))]
        records.append(Record(str(number), tokens, [draws.random() < 0.6 for _ in tokens]))
    return pack(records, width=20, weight_of_step=1.0, step=seed)[0]


def tensors_of(rows: AlignedRows) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    rows.each(note)
    return found


@pytest.mark.parametrize("depths", [(1,), (1, 2, 3), (2, 4, 30)])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("block_length", [1, 3])
def test_planned_rows_are_those_that_are_found(depths: tuple[int, ...], lag: int, block_length: int) -> None:
    for seed in range(4):
        batch = batch_of(seed)
        states_BTD = {depth: torch.zeros(*batch.tokens_BT.shape, 2) for depth in depths}
        drafted = DraftOutput(states_BTD, lambda states_ND, _: states_ND, lag)
        found = align(drafted, batch, block_length=block_length)
        with_plan = planned(batch, [RowsAsked(depths, lag, block_length)])
        again = align(drafted, with_plan, block_length=block_length)
        assert with_plan.plan is not None
        assert again is with_plan.plan.rows[RowsAsked(depths, lag, block_length)]
        assert again.counts == found.counts
        for ours, theirs in zip(tensors_of(again), tensors_of(found), strict=True):
            assert torch.equal(ours, theirs)
        assert with_plan.num_tokens == int((batch.documents_BT >= 0).sum())
        # Rows that nobody planned are found as before.
        other = align(replace(drafted, lag=1 - lag), with_plan, block_length=block_length)
        assert torch.equal(other.drafter_N, align(replace(drafted, lag=1 - lag), batch).drafter_N)


def test_a_plan_moves_with_its_batch_and_a_shared_tensor_moves_once(tiny_target: Target) -> None:
    batch = batch_of(0)
    seen = TargetOutput(final_BTD=torch.randn(*batch.tokens_BT.shape, 32))
    batch = replace(batch, target=seen, target_rows=tiny_target.rows_of(seen))
    batch = planned(batch, [RowsAsked((1, 2), 1)])
    there = batch.to("meta")
    assert there.plan is not None
    assert there.num_tokens == batch.num_tokens, "known without asking the device"
    (rows,) = there.plan.rows.values()
    assert all(tensor.is_meta for tensor in tensors_of(rows))
    moved: list[int] = []
    batch.each(lambda tensor: moved.append(id(tensor)) or tensor)  # type: ignore[func-returns-value]
    assert len(moved) == len(set(moved))
    assert moved.count(id(seen.final_BTD)) == 1
