"""Chosen roots: which rows a block drafter trains, and that their weighted sum estimates the sum over all roots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.target_rows import RowsAsked
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.losses import losses
from drafttrain.losses.align import align, chosen_rows, chosen_slots, planned, rows_of
from drafttrain.losses.fused import can_be_fused
from drafttrain.losses.row_choice import Anchors, DroppedDepths
from drafttrain.losses.step import drafted_loss
from tests.losses.test_losses import FloatTarget, V


def target_of(batch: DraftBatch) -> FloatTarget:
    """The target's logits at every slot."""
    place = batch.documents_BT.flatten() * 10.0 + batch.positions_BT.flatten()
    return FloatTarget((place[:, None] * torch.arange(1.0, V + 1) * 0.37).cos() * 2)


DEPTHS = (1, 2, 3)
WIDTH = 4
# Holes in the masks: a label that is not trained ends the blocks before it.
MASKS = ["..xxxx.xxx", "xxxxxx", "....x", "......", ".x.x.xxxx"]


def records() -> list[Record]:
    generator = torch.Generator().manual_seed(3)
    return [
        Record(str(number), torch.randint(V, (len(mask),), generator=generator).tolist(), [c == "x" for c in mask])
        for number, mask in enumerate(MASKS)
    ]


def batch_of(chosen: list[Record], *, step: int = 0, width: int = 40) -> DraftBatch:
    return replace(pack(chosen, width=width, weight_of_step=10.0)[0], step=step)


def possible_roots(batch: DraftBatch) -> dict[int, list[int]]:
    """By slot of a root, the depths it has: read straight from the definition."""
    tokens, found = batch.tokens_BT.shape[1], {}
    mask, document = batch.loss_mask_BT.flatten().tolist(), batch.documents_BT.flatten().tolist()
    for slot in range(len(mask)):
        depths = []
        for depth in DEPTHS:
            label = slot + depth
            same_row = label < len(mask) and label // tokens == slot // tokens
            if not same_row or not mask[label] or document[label] != document[slot] or document[slot] < 0:
                break
            depths.append(depth)
        if depths:
            found[slot] = depths
    return found


def drafted(batch: DraftBatch, choice: Anchors | None, *, fused: bool) -> DraftOutput:
    """States that are a function of root and depth only, so that every choice of roots sees the same ones."""
    asked = RowsAsked(DEPTHS, 0, choice=choice)
    slots = torch.arange(batch.tokens_BT.numel()) if choice is None else chosen_slots(batch, asked)
    place = batch.documents_BT.flatten()[slots] * 100.0 + batch.positions_BT.flatten()[slots]
    states = {d: (place[None, :, None] * torch.tensor([0.3, 0.7, 1.1, 0.5]) * d).sin().double() for d in DEPTHS}
    if choice is None:
        states = {depth: state.view(*batch.tokens_BT.shape, WIDTH) for depth, state in states.items()}
    head = torch.nn.Linear(WIDTH, V, bias=False).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    one = LinearHead(lambda _: head) if fused else (lambda states_ND, _: head(states_ND))
    return DraftOutput({d: s.requires_grad_() for d, s in states.items()}, one, 0, {2: 0.5, 3: 0.25}, choice=choice)


def loss_of(batch: DraftBatch, choice: Anchors | None, *, name: str = "tvd", fused: bool = True, chunk: int = 3):
    made = drafted(batch, choice, fused=fused)
    assert can_be_fused(made) == fused
    loss = losses.build(losses.entry(name).settings())
    rows = align(made, batch)
    target = replace(batch, target_rows=target_of(batch))
    value = drafted_loss(loss, made, rows, target, vocab_size=V, chunk_rows=chunk)
    value.total.backward()
    return value, rows, made


@pytest.mark.parametrize("step", range(4))
def test_each_document_has_its_roots_and_every_root_its_whole_block(step):
    batch = batch_of(records(), step=step)
    possible = possible_roots(batch)
    rows = rows_of(batch, RowsAsked(DEPTHS, 0, choice=Anchors(2)))
    found: dict[int, list[int]] = {}
    first = 0
    for depth, count in rows.counts.items():
        for row in range(first, first + count):
            root = int(rows.slots_A[rows.drafter_N[row]])
            found.setdefault(root, []).append(depth)
            assert rows.target_N[row] == root + depth - 1
            assert rows.tokens_N[row] == batch.tokens_BT.flatten()[root + depth]
        first += count
    assert found == {root: possible[root] for root in found}
    document = batch.documents_BT.flatten()
    for number in document.unique().tolist():
        of_it = [root for root in possible if document[root] == number]
        assert sum(int(document[root] == number) for root in found) == min(2, len(of_it))
    assert sorted(found) == rows.slots_A.tolist()


def test_roots_change_with_the_step_and_not_with_the_packing():
    texts = records()
    asked = RowsAsked(DEPTHS, 0, choice=Anchors(2))

    def places(batch: DraftBatch) -> set[tuple[int, int]]:
        slots = chosen_slots(batch, asked)
        return set(
            zip(batch.documents_BT.flatten()[slots].tolist(), batch.positions_BT.flatten()[slots].tolist(), strict=True)
        )

    one_row, narrow = batch_of(texts, width=40), batch_of(texts, width=10)
    assert one_row.tokens_BT.shape != narrow.tokens_BT.shape
    assert places(one_row) == places(narrow)
    assert len({frozenset(places(batch_of(texts, step=step))) for step in range(6)}) > 1


@pytest.mark.parametrize("name", ["tvd", "forward_kl", "block_acceptance"])
def test_the_fused_gradient_is_that_of_autograd(name):
    batch = batch_of(records())
    (fused, _, one), (plain, _, other) = (
        loss_of(batch, Anchors(2), name=name, fused=fused, chunk=2) for fused in (True, False)
    )
    torch.testing.assert_close(fused.total, plain.total)
    for depth in DEPTHS:
        torch.testing.assert_close(one.states_BTD[depth].grad, other.states_BTD[depth].grad)


def test_enough_roots_give_the_sum_over_all():
    batch = batch_of(records())
    some, rows, _ = loss_of(batch, Anchors(100))
    # The same rows by brute force: all depths of every possible root, one by one.
    every = drafted(batch, None, fused=True)
    target, total = target_of(batch), 0.0
    for root, depths in possible_roots(batch).items():
        for depth in depths:
            p = target.at(torch.tensor([root + depth - 1])).softmax(-1)
            q = every.head(every.states_BTD[depth].flatten(0, 1)[root][None], depth).softmax(-1)
            total += {1: 1.0, 2: 0.5, 3: 0.25}[depth] * float((p - q).detach().abs().sum() / 2)
    assert rows.scale_N is not None
    assert set(rows.scale_N.tolist()) == {1.0}
    assert float(some.total.detach()) == pytest.approx(total, rel=1e-6)


@pytest.mark.long
def test_the_sum_over_chosen_roots_estimates_the_sum_over_all():
    texts = records()
    whole = float(loss_of(batch_of(texts), Anchors(100))[0].total.detach())
    totals, unweighted = [], []
    for step in range(300):
        value, rows, _ = loss_of(batch_of(texts, step=step), Anchors(2))
        totals.append(float(value.total.detach()))
        unweighted.append(float((value.loss_N / rows.scale_N).sum()))
    error = torch.tensor(totals).std() / len(totals) ** 0.5
    assert abs(torch.tensor(totals).mean() - whole) < 4 * error
    # Without the weights long texts count too little.
    assert whole - torch.tensor(unweighted).mean() > 20 * error


def test_a_batch_without_trained_labels_has_one_slot_and_no_rows():
    batch = batch_of([Record("none", [1, 2, 3], [False] * 3)])
    asked = RowsAsked(DEPTHS, 0, choice=Anchors(2))
    assert chosen_slots(batch, asked).tolist() == [0]
    value, rows, made = loss_of(batch, Anchors(2))
    assert len(rows.tokens_N) == 0
    assert float(value.total.detach()) == 0
    assert all(not state.grad.any() for state in made.states_BTD.values())


def test_the_plan_has_the_rows_of_the_choice():
    batch = batch_of(records())
    asked = RowsAsked(DEPTHS, 0, block_length=5, choice=Anchors(2))
    ready = planned(batch, [asked])
    assert rows_of(ready, RowsAsked(DEPTHS, 0, choice=Anchors(2))) is ready.plan.rows[asked]
    moved = ready.each(lambda tensor: tensor.clone())
    for name in ("slots_A", "scale_N", "read_U", "drafter_N"):
        assert torch.equal(getattr(moved.plan.rows[asked], name), getattr(ready.plan.rows[asked], name))


EIGHT = tuple(range(1, 9))
LONG = ["." * 10 + "x" * 42, "." * 8 + "x" * 7, "x" * 3, "." * 5]


def long_batch(*, step: int = 0, width: int = 80, chosen: tuple[int, ...] = (0, 1, 2, 3)) -> DraftBatch:
    texts = [Record(str(number), [1] * len(mask), [c == "x" for c in mask]) for number, mask in enumerate(LONG)]
    batch, _ = pack([texts[i] for i in chosen], width=width, first_document=chosen[0], weight_of_step=1.0)
    return replace(batch, step=step)


def kept_rows(
    batch: DraftBatch, choice: DroppedDepths, depths: tuple[int, ...] = EIGHT
) -> dict[int, set[tuple[int, int]]]:
    """By depth, (document, position) of the rows."""
    rows = chosen_rows(batch, RowsAsked(depths, 1, choice=choice))
    where = list(zip(batch.documents_BT.flatten().tolist(), batch.positions_BT.flatten().tolist(), strict=True))
    for rows_n, on_host in rows.values():
        assert torch.equal(rows_n, on_host)
    return {depth: {where[row] for row in rows_n.tolist()} for depth, (rows_n, _) in rows.items()}


def test_depths_have_the_published_sizes_and_are_nested_in_each_document():
    """40 rows of depth 1 give 27, 18, 12, 8, 7, 6 and 6 of the further ones; a row of a depth has all depths before it."""
    choice = DroppedDepths()
    assert [choice.most(40, depth) for depth in range(2, 9)] == [27, 18, 12, 8, 7, 6, 6]
    for step in range(4):
        batch = long_batch(step=step)
        kept = kept_rows(batch, choice)
        for document, (mask, places) in enumerate(zip(LONG, (10, 8, 0, 5), strict=True)):
            rows = {depth: {place for number, place in found if number == document} for depth, found in kept.items()}
            every = set(range(max(0, places - 2), len(mask) - 2)) if "x" in mask else set()
            assert rows[1] == every
            for depth in range(2, 9):
                assert rows[depth] <= rows[depth - 1]
                last = len(mask) - 1 - depth - 1
                assert all(place <= last for place in rows[depth])
                # The pool may be smaller than the size: rows near the end have no label so far ahead.
                pool = {place for place in rows[depth - 1] if place <= last}
                assert len(rows[depth]) == min(len(pool), choice.most(len(every), depth))


def test_the_draw_of_depths_depends_on_step_and_document_only():
    choice = DroppedDepths()
    whole = kept_rows(long_batch(width=80), choice)
    assert whole == kept_rows(long_batch(width=53), choice)
    alone = kept_rows(long_batch(width=53, chosen=(1,)), choice)
    assert {depth: {one for one in found if one[0] == 1} for depth, found in whole.items()} == alone
    assert len({frozenset(kept_rows(long_batch(step=step), choice)[3]) for step in range(5)}) == 5


def test_every_row_is_kept_as_often_as_the_others():
    """Also at depth 3, whose rows are drawn from those of depth 2. The control: the first rows instead of a draw."""
    choice, counts = DroppedDepths(), torch.zeros(50)
    for step in range(400):
        for document, place in kept_rows(long_batch(step=step, chosen=(0,)), choice, (1, 2, 3))[3]:
            assert document == 0
            counts[place] += 1
    rows = counts[8:48]  # from the first row to the last whose label of depth 3 is in the text
    expected = rows.sum() / len(rows)
    assert float(((rows - expected) ** 2 / expected).sum()) < 80
    first = torch.zeros(40).index_fill(0, torch.arange(int(rows.sum()) // 400), 400.0)
    assert float(((first - expected) ** 2 / expected).sum()) > 1000


def test_states_of_kept_rows_lie_in_the_order_of_the_rows():
    batch = long_batch()
    rows = rows_of(batch, RowsAsked(EIGHT, 1, choice=DroppedDepths()))
    places = rows.drafter_N.split(list(rows.counts.values()))
    assert all(torch.equal(place_n, torch.arange(len(place_n))) for place_n in places)
    assert rows.scale_N is None
    assert rows.slots_A is None
