"""A drafter that can say only some of the target's tokens: what its loss is, what it cannot learn, what is truly accepted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.probability import acceptance_rate, over_target_vocabulary
from drafttrain.core.target_rows import RowIndex
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.chunked import row_losses
from drafttrain.losses.forward_kl import ForwardKLSettings
from drafttrain.losses.tvdpp import TVDPPSettings
from drafttrain.losses.weighted_sum import Term, WeightedSumSettings
from tests.losses.test_losses import EVERY, Toy, ToyOfParts, ToyTarget, V, records, step_gradient

SOME = torch.tensor([0, 2, 3, 6])


def measured(settings: Any, vocabulary: Tensor | None = SOME, *, chunk: int | None = None) -> dict[str, Any]:
    """Return the loss of all rows and what it is made of."""
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=ToyTarget(batch))
    drafter = Toy(vocabulary)
    drafted = drafter(batch)
    rows = align(drafted, batch)
    loss_N, acceptance_N = row_losses(losses.build(settings), drafted, rows, batch, vocab_size=V, chunk_rows=chunk)
    return {
        "loss": loss_N,
        "acceptance": acceptance_N,
        "target": batch.target_rows.at(rows.target_N).softmax(-1),
        "drafter": drafted.head(drafted.states_BTD[1].flatten(0, 1)[rows.drafter_N], 1).softmax(-1),
        "labels": rows.tokens_N,
        "parameters": list(drafter.parameters()),
    }


def test_the_loss_sees_the_targets_distribution_renormalised_on_the_vocabulary():
    found = measured(ForwardKLSettings())
    p, q = found["target"][:, SOME], found["drafter"]
    p = p / p.sum(-1, keepdim=True)
    can = torch.isin(found["target"].argmax(-1), SOME)
    assert 0 < can.sum() < len(can)
    wanted = torch.where(can, (p * (p / q).log()).sum(-1), 0.0)
    torch.testing.assert_close(found["loss"], wanted.float())


def test_rows_whose_likeliest_token_is_missing_teach_nothing():
    found = measured(ForwardKLSettings())
    cannot = ~torch.isin(found["target"].argmax(-1), SOME)
    assert (found["loss"][cannot] == 0).all()
    gradients = torch.autograd.grad(found["loss"][cannot].sum(), found["parameters"], allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_the_acceptance_rate_is_over_the_targets_whole_vocabulary():
    found = measured(TVDPPSettings())
    q = over_target_vocabulary(found["drafter"], SOME, size=V)
    torch.testing.assert_close(found["acceptance"], acceptance_rate(found["target"], q))
    p = found["target"][:, SOME]
    renormalised = acceptance_rate(p / p.sum(-1, keepdim=True), found["drafter"])
    assert found["acceptance"].mean() < renormalised.mean() - 0.05  # the control: what the loss sees flatters


@EVERY
def test_the_whole_vocabulary_in_its_order_is_none(settings):
    torch.testing.assert_close(measured(settings, torch.arange(V))["loss"], measured(settings, None)["loss"])


@EVERY
def test_a_step_does_not_depend_on_its_layout_with_a_smaller_vocabulary(settings):
    """Normalised by the trained positions of the step."""
    whole = step_gradient(settings, sizes=[6], vocabulary=SOME)
    assert whole.abs().max() > 0
    for layout in ({"sizes": [6], "extra": 9}, {"sizes": [2, 4]}, {"sizes": [1] * 6}, {"sizes": [6], "chunk": 3}):
        for toy in (Toy, ToyOfParts):
            other = step_gradient(settings, vocabulary=SOME, toy=toy, **layout)
            torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-7)


def test_control_a_mean_over_all_positions_depends_on_padding():
    def mean(total: Tensor, batch: DraftBatch, **_: Any) -> Tensor:
        return total / batch.tokens_BT.numel()

    settings = ForwardKLSettings()
    whole = step_gradient(settings, sizes=[6], vocabulary=SOME, normalise=mean)
    padded = step_gradient(settings, sizes=[6], extra=9, vocabulary=SOME, normalise=mean)
    assert not torch.allclose(whole, padded, rtol=0.1)


def test_hard_labels_outside_the_vocabulary_teach_nothing():
    found = measured(CrossEntropySettings())
    can = torch.isin(found["labels"], SOME)
    assert 0 < can.sum() < len(can)
    place = torch.searchsorted(SOME, found["labels"]).clamp(max=len(SOME) - 1)
    wanted = torch.where(can, -found["drafter"].gather(1, place[:, None])[:, 0].log(), 0.0)
    torch.testing.assert_close(found["loss"], wanted.float())
    # In a sum with a loss that has the target, rows are chosen by the target, and only the hard part loses such labels.
    both = WeightedSumSettings(terms=[Term(loss=ForwardKLSettings()), Term(loss=CrossEntropySettings(), weight=0.5)])
    soft, hard = measured(ForwardKLSettings()), torch.isin(found["target"].argmax(-1), SOME) * found["loss"]
    torch.testing.assert_close(measured(both)["loss"], soft["loss"] + 0.5 * hard)


def test_the_rewards_mean_of_tvdpp_is_over_rows_that_can_be_learned():
    found = measured(TVDPPSettings(scope="batch"))
    loss = losses.build(TVDPPSettings(scope="batch"))
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=ToyTarget(batch))
    drafted = Toy(SOME)(batch)
    row_losses(loss, drafted, align(drafted, batch), batch, vocab_size=V)
    assert float(loss.sums_2[1]) == int(torch.isin(found["target"].argmax(-1), SOME).sum())


@EVERY
def test_a_micro_batch_of_which_nothing_can_be_learned_still_has_a_backward_pass(settings):
    batch, _ = pack([Record("0", [1, 1, 1, 1], [True] * 4)], width=4, weight_of_step=1.0)

    class Missing:
        def at(self, index_N: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.ones_like(index_N), V).double() * 9

    drafter = Toy(SOME)
    drafted = drafter(replace(batch, target_rows=Missing()))
    loss_N, _ = row_losses(
        losses.build(settings), drafted, align(drafted, batch), replace(batch, target_rows=Missing()), vocab_size=V
    )
    assert len(loss_N) == 3
    loss_N.sum().backward()
    if settings.kind == "confidence":  # of the prediction alone; the head has a gradient beside it in a sum
        assert not drafter.table_VD.grad.any()
        return
    assert drafter.head_DV.grad is not None
    assert not drafter.head_DV.grad.any()


def test_a_depth_that_cannot_be_learned_ends_its_block():
    loss = losses.build(losses.entry("block_acceptance").settings())
    a = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    zeros = torch.zeros(5, dtype=torch.long)
    # Depths 1, 2, 4 of one block, 2 and 3 of another, whose first depth is not trained.
    index = RowIndex(zeros, torch.tensor([1, 2, 4, 2, 3]), torch.tensor([0, 0, 0, 1, 1]))
    first, second = 1 - (0.9 + 0.9 * 0.8) / 3, 1 - (0.6 + 0.6 * 0.5) / 2
    torch.testing.assert_close(loss.combine({"acceptance": a}, index), torch.tensor([first] * 3 + [second] * 2))


def test_depth_weights_apply_beside_a_smaller_vocabulary():
    batch, _ = pack(records(), width=12, weight_of_step=1.0)
    batch = replace(batch, target_rows=ToyTarget(batch))
    drafter = Toy(SOME)
    states = drafter.table_VD[batch.tokens_BT]
    plain = DraftOutput({1: states, 2: states}, drafter.head, lag=1, vocabulary=SOME)
    rows = align(plain, batch)
    loss = losses.build(ForwardKLSettings())
    first, _ = row_losses(loss, plain, rows, batch, vocab_size=V)
    second, _ = row_losses(loss, replace(plain, depth_weights={2: 0.25}), rows, batch, vocab_size=V)
    torch.testing.assert_close(second, first * torch.where(rows.index.depth_N == 2, 0.25, 1.0))
