"""Hidden Transfer: pseudo states equal a plain forward after each token; what is trained; what the target's rows see; its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.hidden_transfer import rollout
from drafttrain.drafters.hidden_transfer.module import HiddenTransferDrafter
from drafttrain.drafters.hidden_transfer.rollout import pseudo_states
from drafttrain.drafters.hidden_transfer.settings import HiddenTransferSettings, layers_of
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.drafters.eagle_models import eagle_target, packed
from tests.drafters.hidden_transfer_models import transfer

LENGTHS = (9, 7, 12)


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def logits_of(drafter: Any, batch: Any) -> torch.Tensor:
    """Return logits_BTKV at every position."""
    with torch.no_grad():
        drafted = drafter(batch)
        return torch.stack([drafted.logits_BTV(depth) for depth in sorted(drafted.states_BTD)], dim=2)


@torch.no_grad()
def plain_logits(drafter: Any, target: Target, tokens: list[int], place: int, *, shift: int = 1) -> torch.Tensor:
    """Return logits_KV after a text, one pseudo state after the other, with the blocks called one by one.

    Args:
        shift: Places from one pseudo state to the next; 0 is the wrong variant.
    """
    text, cache, inner = torch.tensor([tokens[: place + 1]]), DynamicCache(), target.model.model
    hidden = target.read(text, torch.arange(place + 1)[None], TargetNeeds(hidden=tuple(set(drafter.layers)))).hidden_BTD
    inner(text, past_key_values=cache)
    found = []
    for step, (layer, linear) in enumerate(zip(drafter.layers, drafter.maps, strict=True), start=1):
        read_D = hidden[layer][0, -1]
        stream, position = (read_D + linear(read_D))[None, None], torch.tensor([[place + 1 + shift * (step - 1)]])
        angles = inner.rotary_emb(stream, position)
        for block in inner.layers[layer:]:
            stream = block(stream, position_ids=position, past_key_values=cache, position_embeddings=angles)
            stream = stream[0] if isinstance(stream, tuple) else stream
        found.append(target.model.lm_head(inner.norm(stream))[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("layers", [[1, 2, 2], [2, 2, 4], [3, 3, 3]])
@pytest.mark.parametrize("width", [12, 22])  # one document a row, padded; two documents in a row
def test_every_row_of_packed_texts_is_a_draft_after_its_text(target, layers, width):
    drafter = transfer(target, layers=layers)
    batch, places = packed(target, drafter, LENGTHS, width=width)
    ours = logits_of(drafter, batch)
    for (row, column), length in zip(places, LENGTHS, strict=True):
        tokens = batch.tokens_BT[row, column : column + length].tolist()
        for place in (0, length - 1):
            plain_KV = plain_logits(drafter, target, tokens, place)
            torch.testing.assert_close(ours[row, column + place], plain_KV, rtol=0, atol=1e-10)


def test_control_pseudo_states_at_one_position_break_the_identity(target):
    drafter = transfer(target)
    batch, _ = packed(target, drafter, LENGTHS[:1], width=9)
    wrong_KV = plain_logits(drafter, target, batch.tokens_BT[0].tolist(), 6, shift=0)
    distance_K = (logits_of(drafter, batch)[0, 6] - wrong_KV).abs().amax(dim=-1)
    assert float(distance_K[0]) < 1e-10
    assert float(distance_K[1:].min()) > 1e-3


def of_text(target: Target, drafter: Any) -> float:
    """Return the largest difference of the text's final states beside pseudo states from the target's own."""
    batch, _ = packed(target, drafter, LENGTHS, width=22)
    maps = [lambda states, step=step: drafter.pseudo(step, states) for step in range(drafter.num_steps)]
    hidden_BTD = batch.target.hidden_BTD[drafter.layers[0]]
    with torch.no_grad():
        text_BTD, *_ = pseudo_states(target.model, maps, drafter.layers, hidden_BTD, batch.positions_BT)
    own_BTD = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True)).final_BTD
    return float((text_BTD - own_BTD).abs().max())


def test_pseudo_states_leave_the_texts_own_states_as_they_are(target, monkeypatch):
    drafter = transfer(target)
    assert of_text(target, drafter) < 1e-10
    # The control: the text's rows attend to the pseudo states of their place too.
    mask = rollout._mask

    def seen_by_the_text(positions: torch.Tensor, *, steps: int, dtype: torch.dtype) -> torch.Tensor:
        found, place = mask(positions, steps=steps, dtype=dtype), torch.arange(positions.shape[1])
        for step in range(1, steps):
            found[0, 0, place, step * len(place) + place] = 0
        return found

    monkeypatch.setattr(rollout, "_mask", seen_by_the_text)
    assert of_text(target, drafter) > 1e-3


def test_after_the_last_block_a_map_is_a_linear_head_on_the_state(target):
    def difference(layer: int) -> float:
        drafter = transfer(target, layers=[layer, layer])
        batch, _ = packed(target, drafter, LENGTHS, width=22)
        states = target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(hidden=(4,))).hidden_BTD[4]
        inner, ours = target.model.model, logits_of(drafter, batch)
        with torch.no_grad():
            linear = [target.model.lm_head(inner.norm(states + one(states))) for one in drafter.maps]
        return float((ours - torch.stack(linear, dim=2)).abs().max())

    assert difference(4) < 1e-10
    assert difference(3) > 1e-2


def test_maps_start_as_the_identity(target):
    drafter = HiddenTransferDrafter.create(HiddenTransferSettings(), target=target, tokenizer=None)
    assert drafter.layers == [2, 3, 4]
    assert sum(weight.numel() for weight in drafter.parameters()) == 3 * 32**2
    states = torch.randn(2, 32, dtype=torch.float64)
    assert all(torch.equal(drafter.pseudo(step, states), states) for step in range(3))


def trained_batch(target: Target, drafter: Any, *, step: int = 0) -> Any:
    texts = [list(range(3, 15)), list(range(40, 49))]
    batch, _ = pack(
        [Record("", text, [i > 3 for i in range(len(text))]) for text in texts], width=24, weight_of_step=1.0, step=step
    )
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    return replace(batch, target=seen, target_rows=target.rows_of(seen), num_steps=6)


def gradients(target: Target, drafter: Any, *, step: int = 0) -> list[torch.Tensor]:
    loss = losses.build(losses.entry("forward_kl").settings())
    drafter.zero_grad()
    batch_loss(drafter, loss, trained_batch(target, drafter, step=step), vocab_size=257).total.backward()
    return [weight.grad.clone() for weight in drafter.parameters()]


def test_gradients_reach_the_maps_alone(target):
    """In turn: the map of this step. Earlier pseudo states, to which it attends, get none."""
    before = target.weights_digest()
    in_turn, together = transfer(target).train(), transfer(target, train_steps="together").train()
    for step in range(6):
        assert [bool(one.any()) for one in gradients(target, in_turn, step=step)] == [step // 2 == i for i in range(3)]
    assert all(bool(one.any()) for one in gradients(target, together))
    optimizer = torch.optim.Adam(together.parameters(), lr=1e-2)
    optimizer.step()
    assert all(weight.grad is None for weight in target.model.parameters())
    assert target.weights_digest() == before
    # The control: the digest does notice a weight.
    weight = target.model.model.norm.weight
    with torch.no_grad():
        weight[0] += 1
        assert target.weights_digest() != before
        weight[0] -= 1


def test_a_step_in_turn_trains_as_it_does_beside_fixed_maps(target):
    """The gradient of the last step is that of its own loss, with the earlier maps as constants."""
    drafter = transfer(target).train()
    (*_, last) = gradients(target, drafter, step=5)
    drafter.train_steps = "together"
    drafter.maps[0].requires_grad_(False)
    drafter.maps[1].requires_grad_(False)
    batch, loss = trained_batch(target, drafter, step=5), losses.build(losses.entry("forward_kl").settings())
    drafter.zero_grad()
    only_last = replace(drafter(batch), depth_weights={1: 0.0, 2: 0.0, 3: 1.0})
    batch_loss(lambda _: only_last, loss, batch, vocab_size=257).total.backward()
    torch.testing.assert_close(drafter.maps[2].weight.grad, last, rtol=1e-6, atol=1e-8)


def test_recomputed_activations_give_the_same_gradients_and_run_the_blocks_again(target):
    drafter = transfer(target, train_steps="together").train()
    ran: list[int] = []
    hook = target.model.model.layers[3].self_attn.q_proj.register_forward_hook(lambda *_: ran.append(1))
    plain, once = gradients(target, drafter), len(ran)
    drafter.recompute_activations()
    again = gradients(target, drafter)
    hook.remove()
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    # The target's own read of the batch is one call.
    assert len(ran) - once == 2 * (once - 1) + 1


def test_the_files_read_back(target, tmp_path):
    drafter = transfer(target, draft="greedy", draft_in="own_pass", train_steps="together")
    drafter.save(tmp_path)
    again = HiddenTransferDrafter.load(tmp_path, target, "float64")
    assert (again.draft, again.draft_in, again.train_steps) == ("greedy", "own_pass", "together")
    batch, _ = packed(target, drafter, LENGTHS, width=22)
    assert torch.equal(logits_of(drafter, batch), logits_of(again, batch))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("layers", [1, 5, 5], r"layers must be .* of 1\.\.4"),
        ("layers", [3, 2, 2], "not falling"),
        ("draft_in", "both", "draft_in"),
        ("draft", "drawn", "draft must be sampled or greedy"),
        ("hidden_size", 64, "hidden_size"),
        ("target_fingerprint", "other", "target_fingerprint"),
    ],
)
def test_a_wrong_field_is_named(target, tmp_path, key, value, named):
    transfer(target).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=named):
        HiddenTransferDrafter.load(tmp_path, target)


def test_settings_name_what_is_wrong():
    wrong = HiddenTransferSettings(num_steps=3, layers=[4, 2])
    assert [line.partition(" ")[0] for line in wrong.check()] == ["layers:", "layers:"]
    assert layers_of(None, num_steps=4, num_blocks=3) == [1, 2, 3, 3]
    with pytest.raises(CheckpointError, match=r"drafter\.layers must be of 1\.\.4 for this target"):
        layers_of([2, 5], num_steps=2, num_blocks=4)
