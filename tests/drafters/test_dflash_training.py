"""DFlash in training: blocks at the chosen roots only, packed rows, rows without roots, a frozen target, files."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import as_padding, pack
from drafttrain.drafters.dflash.dflash import DFlash, DFlashSettings
from drafttrain.losses import losses
from drafttrain.losses.align import align, chosen_slots
from drafttrain.losses.step import BatchLoss, batch_loss, with_plan
from tests.drafters.block_models import SETTINGS, block_drafter, block_target

TEXTS = [list(range(3, 21)), list(range(30, 35)), list(range(40, 54))]
MASKS = [[5 <= i < 9 or i >= 12 for i in range(18)], [False] * 5, [6 <= i < 10 for i in range(14)]]
"""Two answers, none, one that ends before a question."""


@pytest.fixture(scope="module")
def target() -> Any:
    return block_target()


def batch_of(target: Any, drafter: Any, chosen: list[int], *, width: int = 24, step: int = 0) -> Any:
    """Return some of the texts, packed and read by the target."""
    records = [Record(str(i), TEXTS[i], MASKS[i]) for i in chosen]
    batch, _ = pack(records, width=width, first_document=chosen[0], weight_of_step=1.0, step=step)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    return replace(batch, target=seen, target_rows=target.rows_of(seen))


def loss_of(drafter: Any, batch: Any, kind: str = "forward_kl") -> BatchLoss:
    loss = losses.build(losses.entry(kind).settings())
    return batch_loss(drafter, loss, batch, vocab_size=257)


def gradients(drafter: Any, total: torch.Tensor) -> list[torch.Tensor]:
    weights = [weight for weight in drafter.parameters() if weight.requires_grad]
    return [given for given in torch.autograd.grad(total, weights, allow_unused=True) if given is not None]


@pytest.mark.parametrize("plan", [False, True])
def test_training_computes_the_chosen_roots_only(target, plan):
    """Their states are those of a forward over all slots; depth 1 of each and no row after a label that is not trained."""
    drafter = block_drafter(target)
    batch = batch_of(target, drafter, [0, 1, 2])
    with torch.no_grad():
        whole = drafter.eval()(batch)
    drafter.train()
    batch = with_plan(drafter, losses.build(losses.entry("ce").settings()), batch) if plan else batch
    computed: list[int] = []
    drafter.layers[0].mlp.register_forward_hook(lambda _, inputs, __: computed.append(len(inputs[0])))
    drafted = drafter(batch)
    slots_A = chosen_slots(batch, drafter.rows_asked()[0])
    assert computed == [len(slots_A)] == [6]
    for depth, states_1AD in drafted.states_BTD.items():
        dense_AD = whole.states_BTD[depth].flatten(0, 1)[slots_A]
        torch.testing.assert_close(states_1AD[0], dense_AD, rtol=0, atol=1e-12)
    rows = align(drafted, batch)
    labels = (slots_A[rows.drafter_N] + rows.index.depth_N).tolist()
    assert all(batch.loss_mask_BT.flatten()[label] for label in labels)
    assert batch.tokens_BT.flatten()[labels].tolist() == rows.tokens_N.tolist()


def test_other_roots_are_drawn_in_every_step(target):
    drafter = block_drafter(target).train()
    drawn = {
        tuple(chosen_slots(batch_of(target, drafter, [0, 1, 2], step=step), drafter.rows_asked()[0]).tolist())
        for step in range(5)
    }
    assert len(drawn) > 2


def test_documents_packed_in_a_row_train_as_they_do_apart(target):
    drafter = block_drafter(target).train()
    together = loss_of(drafter, batch_of(target, drafter, [0, 1, 2], width=40))
    apart = [loss_of(drafter, batch_of(target, drafter, [number], width=18)) for number in range(3)]
    assert float(together.total.detach()) == pytest.approx(sum(float(one.total.detach()) for one in apart), rel=1e-6)
    both = [gradients(drafter, one.total) for one in (together, apart[0], apart[2])]
    for whole, *parts in zip(*both, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-5)


def test_roots_of_padding_change_no_state_and_no_gradient(target, monkeypatch):
    drafter = block_drafter(target).train()
    batch = batch_of(target, drafter, [0, 1, 2])
    plain = loss_of(drafter, batch)
    wanted = gradients(drafter, plain.total)
    monkeypatch.setattr("drafttrain.drafters.dflash.drafter.is_compiled_by_size", lambda *_: True)
    monkeypatch.setattr("drafttrain.drafters.dflash.blocks.few_sizes", lambda count: -(-count // 16) * 16)
    computed: list[int] = []
    drafter.layers[0].mlp.register_forward_hook(lambda _, inputs, __: computed.append(len(inputs[0])))
    padded = loss_of(drafter, batch)
    assert computed == [16]
    for ours, theirs in zip([padded.total, *gradients(drafter, padded.total)], [plain.total, *wanted], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chosen", [[1], [0], [0, 1, 2]])
@pytest.mark.parametrize("recomputed", [False, True])
def test_losses_and_gradients_are_finite_with_few_roots_and_with_none(target, chosen, recomputed):
    drafter = block_drafter(target, anchors=64).train()
    if recomputed:
        drafter.recompute_activations()
    batch = batch_of(target, drafter, chosen)
    made = loss_of(drafter, batch)
    found = gradients(drafter, made.total)
    assert len(found) == len(list(drafter.parameters()))
    assert all(bool(given.isfinite().all()) for given in [made.total, *found])
    assert any(bool(given.any()) for given in found) == (chosen != [1])


def test_a_batch_without_trained_rows_runs_one_block(target):
    """A process without records in a step calls the layers as often as the others, so they need not wait."""
    drafter = block_drafter(target).train()
    batch = batch_of(target, drafter, [0, 1, 2])
    batch = replace(as_padding(batch), target=batch.target, target_rows=batch.target_rows)
    assert {len(states_1AD[0]) for states_1AD in drafter(batch).states_BTD.values()} == {1}


def test_recomputed_activations_give_the_same_gradients(target):
    drafter = block_drafter(target).train()
    batch = batch_of(target, drafter, [0, 1, 2])
    wanted = gradients(drafter, loss_of(drafter, batch).total)
    drafter.recompute_activations()
    for ours, theirs in zip(gradients(drafter, loss_of(drafter, batch).total), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_later_depths_count_less(target):
    weights = block_drafter(target, gamma=2.0).depth_weights
    assert weights == pytest.approx({1: 1.0, 2: 0.6065306597, 3: 0.3678794412})


def test_the_loss_of_a_copy_task_is_low_at_its_own_shift_only(target):
    """Slots that repeat the text one place ahead of the root have a loss of depth 1 near 0, and high ones elsewhere."""
    drafter = block_drafter(target).train()
    batch, _ = pack([Record("", list(range(5, 25)), [True] * 20)], width=20, weight_of_step=1.0)
    batch = replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))
    drafted = drafter(batch)
    ahead_A = batch.tokens_BT.flatten()[chosen_slots(batch, drafter.rows_asked()[0]) + 1]
    states = {depth: torch.nn.functional.one_hot(ahead_A, 257).double()[None] for depth in drafted.states_BTD}
    rows = align(replace(drafted, states_BTD=states), batch)
    right = {
        depth: (states[depth][0, rows_N].argmax(dim=-1) == tokens_N).float().mean().item()
        for depth, rows_N, tokens_N in zip(
            rows.counts,
            rows.drafter_N.split(list(rows.counts.values())),
            rows.tokens_N.split(list(rows.counts.values())),
            strict=True,
        )
    }
    assert right == {1: 1.0, 2: 0.0, 3: 0.0}


def test_the_target_stays_frozen_and_every_part_of_the_drafter_is_trained(target):
    drafter = block_drafter(target, draft_vocab_size=200).train()
    before = (target.weights_digest(), [weight.detach().clone() for weight in drafter.parameters()])
    optimizer = torch.optim.SGD(drafter.parameters(), lr=0.1)
    loss_of(drafter, batch_of(target, drafter, [0, 1, 2])).total.backward()
    optimizer.step()
    assert target.weights_digest() == before[0]
    assert all(not torch.equal(now, then) for now, then in zip(drafter.parameters(), before[1], strict=True))


@pytest.mark.parametrize("settings", [{}, {"causal": True, "sample_from_anchor": True, "draft_vocab_size": 200}])
def test_the_files_read_back(target, tmp_path, settings):
    drafter = block_drafter(target, **settings)
    drafter.save(tmp_path)
    again = DFlash.load(tmp_path, target, "float64")
    assert again.config == drafter.config
    batch = batch_of(target, drafter, [0, 2])
    with torch.no_grad():
        for ours, theirs in zip(drafter(batch).states_BTD.values(), again(batch).states_BTD.values(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("dflash_config", "target_layer_ids"), [3, 1], "target_layer_ids"),
        (("dflash_config", "target_layer_ids"), [1, 3], "target_layer_ids"),
        (("dflash_config", "mask_token_id"), 257, "mask_token_id"),
        (("dflash_config", "causal"), 1, "causal"),
        (("block_size",), 1, "block_size"),
        (("sample_from_anchor",), "no", "sample_from_anchor"),
        (("layer_types",), ["sliding_attention", "full_attention"], "layer_types"),
        (("drafttrain", "gamma"), "7", "gamma"),
        (("hidden_size",), 64, "hidden_size"),
    ],
)
def test_a_wrong_field_is_named(target, tmp_path, place, value, named):
    block_drafter(target).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=named):
        DFlash.load(tmp_path, target)


def made(target: Any, **settings: Any) -> DFlash:
    return DFlash.create(DFlashSettings(**SETTINGS | settings), target=target, tokenizer=target.tokenizer)


def test_the_mask_token_is_one_that_no_text_has(target):
    """A row of padding; without one, a spare special token; without one, the user names it."""
    padded = block_target(vocab_size=260)
    assert made(padded, mask_token_id=None).mask_token_id == 257
    with pytest.raises(CheckpointError, match=r"drafter\.mask_token_id: no unused id"):
        made(target, mask_token_id=None)
    spare = block_target(vocab_size=258)
    spare.tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_7|>"]})
    assert made(spare, mask_token_id=None).mask_token_id == 257
    with pytest.raises(CheckpointError, match=r"0\.\.256"):
        made(target, mask_token_id=257)


def test_a_mask_token_that_ends_texts_is_reported(target, capsys):
    made(target, mask_token_id=0)
    assert "drafter.mask_token_id: 0 ends texts" in capsys.readouterr().err


def test_a_tap_behind_the_last_block_is_refused(target):
    with pytest.raises(CheckpointError, match=r"drafter\.taps must be blocks of 0\.\.3"):
        made(target, taps=[1, 4])
