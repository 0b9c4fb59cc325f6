"""The training-time test equals real drafting: step k has the logits of a chain of k tokens with its cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.batches import ReadSlots
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import as_padding, pack
from drafttrain.drafters.eagle import layer as eagle_layer
from drafttrain.losses.align import align, planned
from drafttrain.target_model.packed_attention import Columns
from tests.drafters.eagle_models import chain_logits, eagle_drafter, eagle_target, packed

STEPS = 4
LENGTHS = (9, 7, 12)
KINDS = [
    ("eagle3", {}),
    ("eagle3", {"fc_norm": True, "norm_output": True, "norm_before_residual": True}),
    ("eagle3", {"norm_before_fc": True, "taps": [0, 3]}),
    ("eagle", {}),
]


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def largest_difference(target: Any, drafter: Any, *, width: int) -> list[float]:
    """Return, by step, the largest difference between the packed rollout and chains drafted token by token."""
    batch, places = packed(target, drafter, LENGTHS, width=width)
    with torch.no_grad():
        states = drafter(replace(batch, num_depths=STEPS)).states_BTD
        worst = [0.0] * STEPS
        for (row, column), length in zip(places, LENGTHS, strict=True):
            tokens = batch.tokens_BT[row, column : column + length].tolist()
            for slot in range(length - STEPS):
                for step, logits in enumerate(chain_logits(drafter, target, tokens, slot, STEPS)):
                    ours = drafter.head(states[step + 1][row, column + slot][None], step + 1)[0]
                    worst[step] = max(worst[step], float((ours - logits).abs().max()))
    return worst


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("width", [12, 22])  # one document a row, padded; two documents in a row
def test_step_k_of_the_rollout_is_a_chain_of_k_draft_tokens(target, kind, settings, width):
    drafter = eagle_drafter(kind, target, **settings)
    assert max(largest_difference(target, drafter, width=width)) < 1e-5


def test_the_identity_holds_in_float32(target):
    drafter = eagle_drafter("eagle3", target, scale=0.1).float()
    assert max(largest_difference(target, drafter, width=22)) < 1e-5


def test_control_a_position_that_does_not_advance_breaks_the_identity(target, monkeypatch):
    drafter = eagle_drafter("eagle3", target)
    rotate = eagle_layer.Rotary.rotate
    batch, _ = packed(target, drafter, LENGTHS, width=22)
    all_1N = batch.positions_BT.flatten()[None]

    def stuck(self: Any, states: Any, positions: Any) -> Any:
        return rotate(self, states, all_1N if positions.shape == all_1N.shape else positions)

    monkeypatch.setattr(eagle_layer.Rotary, "rotate", stuck)
    differences = largest_difference(target, drafter, width=22)
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 1e-2


def test_control_a_missing_key_of_its_own_breaks_the_identity(target, monkeypatch):
    drafter = eagle_drafter("eagle3", target)
    attend = Columns.attend
    monkeypatch.setattr(Columns, "attend", lambda self, query, own: attend(self, query, own[-1:]))
    differences = largest_difference(target, drafter, width=22)
    assert max(differences[:2]) < 1e-5
    assert min(differences[2:]) > 1e-2


def masked(target: Any, drafter: Any) -> Any:
    """Return a batch of two rows: a document with two answers, one without, one that ends with a question, padding."""
    texts = [list(range(3, 21)), list(range(30, 35)), list(range(40, 54))]
    masks = [[5 <= i < 9 or 14 <= i < 18 for i in range(18)], [False] * 5, [6 <= i < 10 for i in range(14)]]
    records = [Record(str(i), text, mask) for i, (text, mask) in enumerate(zip(texts, masks, strict=True))]
    batch, _ = pack(records, width=24, weight_of_step=1.0)
    return replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))


def trained_states(drafter: Any, batch: Any) -> tuple[list[Any], list[Any]]:
    """Return by depth the states of trained rows, and the gradients of the drafter's weights."""
    drafted = drafter(batch)
    rows = align(drafted, batch)
    chosen = rows.drafter_N.split(list(rows.counts.values()))
    states = [drafted.states_BTD[d].flatten(0, 1)[rows_N] for d, rows_N in zip(rows.counts, chosen, strict=True)]
    weights = [p for name, p in drafter.named_parameters() if name not in ("lm_head.weight", "norm.weight")]
    return states, list(torch.autograd.grad(sum(s.square().sum() for s in states), weights))


@pytest.mark.parametrize(("kind", "settings"), [*KINDS[:2], ("eagle", {"num_steps": 3, "feature_noise": 0.0})])
@pytest.mark.parametrize("plan", [False, True])
def test_training_computes_only_what_trained_rows_need(target, kind, settings, plan):
    drafter = eagle_drafter(kind, target, **settings)
    batch = masked(target, drafter)
    whole = trained_states(drafter.eval(), batch)
    seen: list[int] = []
    drafter.layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    batch = planned(batch, drafter.rows_asked(), slots=drafter.reads_slots) if plan else batch
    for ours, theirs in zip(trained_states(drafter.train(), batch), whole, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    # Slot t of depth d predicts token t + d + 1: from the first label minus the deepest step to the third-last token.
    steps = drafter.own["num_steps"]
    first = max(0, 5 - steps - 1), max(0, 6 - steps - 1)
    assert seen == [(16 - first[0]) + (8 - first[1])] * steps


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round the numbers of columns and queries up to multiples of 16, as a CPU in bfloat16 rounds larger ones."""
    monkeypatch.setattr("drafttrain.drafters.eagle.drafter.is_compiled_by_size", lambda *_: True)
    monkeypatch.setattr("drafttrain.core.batches.few_sizes", lambda count: -(-count // 16) * 16)


@pytest.mark.parametrize(("kind", "settings"), [KINDS[1], ("eagle", {"num_steps": 3, "feature_noise": 0.0})])
@pytest.mark.parametrize("texts", ["masked", "whole"])
@pytest.mark.usefixtures("few_sizes")
def test_slots_of_padding_change_no_state_and_no_gradient(target, kind, settings, texts):
    drafter = eagle_drafter(kind, target, **settings)
    batch = masked(target, drafter) if texts == "masked" else packed(target, drafter, LENGTHS, width=22)[0]
    whole = trained_states(drafter.eval(), batch)
    seen: list[int] = []
    drafter.layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    for ours, theirs in zip(trained_states(drafter.train(), batch), whole, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert seen == [seen[0]] * drafter.own["num_steps"]
    assert seen[0] % 16 == 0


@pytest.mark.usefixtures("few_sizes")
def test_control_padding_that_is_read_changes_a_state(target, monkeypatch):
    drafter = eagle_drafter("eagle3", target, num_steps=4)
    batch = masked(target, drafter)
    whole, _ = trained_states(drafter.eval(), batch)
    padded = ReadSlots.padded
    monkeypatch.setattr(ReadSlots, "padded", lambda self, count: replace(padded(self, count), num_padding=0))
    read, _ = trained_states(drafter.train(), batch)
    assert max(float((a - b).detach().abs().max()) for a, b in zip(read, whole, strict=True)) > 0.01


def test_control_slots_that_start_one_too_late_are_not_enough(target, monkeypatch):
    drafter = eagle_drafter("eagle3", target, num_steps=3)
    batch = masked(target, drafter)
    whole, _ = trained_states(drafter.eval(), batch)
    of = ReadSlots.of
    monkeypatch.setattr(ReadSlots, "of", lambda trained, positions: of(trained[trained > trained.min()], positions))
    late, _ = trained_states(drafter.train(), batch)
    assert max(float((a - b).detach().abs().max()) for a, b in zip(late, whole, strict=True)) > 0.1


def test_a_batch_without_trained_rows_has_a_backward_pass(target):
    drafter = eagle_drafter("eagle3", target).train()
    batch = masked(target, drafter)
    batch = replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    sum(states.sum() for states in drafter(batch).states_BTD.values()).backward()
    assert drafter.midlayer.mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize(("kind", "settings"), [("eagle3", {}), ("eagle", {"num_steps": 3, "feature_noise": 0.0})])
@pytest.mark.parametrize("plan", [False, True])
def test_a_batch_without_trained_rows_rolls_out_one_slot(target, kind, settings, plan):
    """A process without records in a step calls the layer as often as the others, so they need not wait."""
    drafter = eagle_drafter(kind, target, **settings).train()
    batch = masked(target, drafter)
    batch = replace(as_padding(batch), target=batch.target)
    seen: list[int] = []
    drafter.layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    batch = planned(batch, drafter.rows_asked(), slots=drafter.reads_slots) if plan else batch
    states = drafter(batch).states_BTD
    assert {depth: states_BTD.shape[:2] for depth, states_BTD in states.items()} == dict.fromkeys(
        states, batch.tokens_BT.shape
    )
    steps = drafter.own["num_steps"]
    assert seen == [batch.shape.rollout(steps).queries] * steps == [1] * steps


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_the_loss_of_a_copy_task_is_low_at_its_own_shift_only(target, kind):
    """Row t of depth d predicts token t + d + 1, so a head that repeats the last embedded token predicts token t + d."""
    drafter = eagle_drafter(kind, target)
    texts = [list(range(5, 16)), list(range(40, 60))]
    batch, _ = pack([Record("", text, [True] * len(text)) for text in texts], width=40, weight_of_step=1.0)
    batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()), num_depths=3)
    embedded: dict[int, Any] = {}
    embed = drafter.embed
    steps = itertools.count(1)

    def watched(tokens: Any) -> Any:
        embedded[next(steps)] = tokens
        return embed(tokens)

    drafter.embed = watched
    drafted = drafter(batch)
    rows = align(drafted, batch)
    # In counting texts the label is the last embedded token plus 1, at this shift and at no other.
    embedded_N = torch.cat([embedded[d].flatten()[rows.drafter_N[rows.index.depth_N == d]] for d in (1, 2, 3)])
    assert torch.equal(embedded_N + 1, rows.tokens_N)
    for wrong in (0, 2):
        moved = align(replace(drafted, lag=wrong), batch)
        embedded_N = torch.cat([embedded[d].flatten()[moved.drafter_N[moved.index.depth_N == d]] for d in (1, 2, 3)])
        assert (embedded_N + 1 == moved.tokens_N).float().mean() < 0.1
