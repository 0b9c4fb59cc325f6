"""Domino: its recurrent unit and correction by their definitions, what a token may depend on, the schedule, folder, sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.domino.domino import FIELDS, Domino, DominoSettings
from drafttrain.drafters.domino.prefix import PrefixGru, correction
from drafttrain.losses import losses
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from drafttrain.training.distill import DistillModule
from drafttrain.training.settings import TrainSettings
from tests.drafters.block_models import block_drafter, block_target, plain_block
from tests.drafters.test_dspark import all_logits, batch_of, text

STATE, RANK = 6, 5
DOMINO: dict[str, Any] = {"gru_hidden_dim": STATE, "emb_dim": RANK}
BOTH = pytest.mark.parametrize("shift_label", [True, False])
ROOT = 5


@pytest.fixture(scope="module")
def target() -> Target:
    return block_target()


def made(target: Target, *, shift_label: bool = True, scale: float = 1.0, **settings: Any) -> Any:
    """Return a drafter whose correction matters."""
    drafter = block_drafter(target, "domino", sample_from_anchor=shift_label, **DOMINO | settings)
    with torch.no_grad():
        for number, weight in enumerate([*drafter.prefix_gru.parameters(), *drafter.embed_proj.parameters()]):
            nn.init.normal_(weight, std=scale, generator=torch.Generator().manual_seed(number))
    return drafter.eval()


def dflash_of(target: Target, drafter: Any) -> Any:
    """Return the DFlash drafter with the same block."""
    dflash = block_drafter(target, "dflash", sample_from_anchor=bool(drafter.config["sample_from_anchor"]), anchors=64)
    dflash.load_state_dict({name: drafter.state_dict()[name] for name in dflash.state_dict()})
    return dflash


def plain_cell(weights: dict[str, Tensor], x: Tensor, state: Tensor, *, reset_before: bool = False) -> Tensor:
    """Return the next state from the definition, gate by gate.

    Args:
        reset_before: The wrong variant: the reset gate multiplies the state, not the product with it.
    """
    w_r, w_z, w_n = weights["prefix_gru.weight_ih_l0"].chunk(3)
    u_r, u_z, u_n = weights["prefix_gru.weight_hh_l0"].chunk(3)
    r = torch.sigmoid(w_r @ x + u_r @ state)
    z = torch.sigmoid(w_z @ x + u_z @ state)
    n = torch.tanh(w_n @ x + (u_n @ (r * state) if reset_before else r * (u_n @ state)))
    return (1 - z) * n + z * state


def plain_corrections(drafter: Any, hidden_KD: Tensor, tokens: list[int], *, uncorrected: int) -> Tensor:
    """Return correction_KV of a block, slot by slot.

    Args:
        tokens: The token before each slot's: the root, then the text's.
    """
    weights, state, found = drafter.state_dict(), torch.zeros(STATE, dtype=torch.float64), []
    for place, token in enumerate(tokens):
        x = drafter._parts.embed(torch.tensor([token]), dtype=torch.float64)[0]
        state = plain_cell(weights, x, state)
        inner = silu(weights["embed_proj.0.weight"] @ torch.cat([hidden_KD[place], state]))
        found.append(weights["embed_proj.2.weight"] @ inner * (place >= uncorrected))
    return torch.stack(found)


# ---------------------------------------------------------------- the recurrent unit


def test_the_recurrent_unit_is_that_of_pytorch_at_once_and_step_by_step():
    ours, theirs = PrefixGru(input_size=7, hidden_size=STATE).double(), nn.GRU(7, STATE, bias=False, batch_first=True)
    theirs = theirs.double()
    theirs.load_state_dict(ours.state_dict())
    inputs_AKD = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at_once = ours.states(inputs_AKD)
    torch.testing.assert_close(at_once, theirs(inputs_AKD)[0], rtol=0, atol=1e-12)
    state = torch.zeros(3, STATE, dtype=torch.float64)
    for place in range(5):
        state = ours.step(inputs_AKD[:, place], state)
        torch.testing.assert_close(at_once[:, place], state, rtol=0, atol=1e-14)
    # The controls: the reset gate before the product, and gates in another order.
    weights = {f"prefix_gru.{name}": weight for name, weight in ours.state_dict().items()}
    plain, wrong = (torch.zeros(STATE, dtype=torch.float64) for _ in range(2))
    for place in range(5):
        plain = plain_cell(weights, inputs_AKD[0, place], plain)
        wrong = plain_cell(weights, inputs_AKD[0, place], wrong, reset_before=True)
    torch.testing.assert_close(plain, state[0], rtol=0, atol=1e-12)
    assert (wrong - state[0]).abs().max() > 1e-4
    swapped = {name: torch.cat([w.chunk(3)[i] for i in (1, 0, 2)]) for name, w in ours.state_dict().items()}
    theirs.load_state_dict(swapped)
    assert (theirs(inputs_AKD)[0] - at_once).abs().max() > 1e-2


# ---------------------------------------------------------------- the definition


@BOTH
def test_without_the_last_matrix_it_is_dflash(target, shift_label):
    drafter, tokens = made(target, shift_label=shift_label), text()
    corrected = all_logits(target, drafter, tokens)
    dflash = dflash_of(target, drafter).eval()
    slots_own = all_logits(target, dflash, tokens)
    torch.nn.init.zeros_(drafter.embed_proj[2].weight)
    torch.testing.assert_close(all_logits(target, drafter, tokens), slots_own, rtol=0, atol=1e-12)
    assert (corrected - slots_own).abs().max() > 1e-1  # the control: it is not 0


def test_a_new_drafter_starts_from_the_slots_own_logits(target):
    settings = DominoSettings(num_layers=1, mask_token_id=256, **DOMINO)
    drafter = Domino.create(settings, target=target, tokenizer=None)
    assert not drafter.embed_proj[2].weight.any()
    assert drafter.embed_proj[0].weight.any()


@BOTH
@pytest.mark.parametrize("uncorrected", [0, 1, 2])
def test_all_slots_at_once_are_the_walk_over_the_same_tokens(target, shift_label, uncorrected):
    """Blocks, states and corrections from loops over heads, keys, slots and gates."""
    drafter, tokens = made(target, shift_label=shift_label, pure_draft_prefix_len=uncorrected), text()
    seen = batch_of(target, drafter, tokens).target
    features_TF = torch.cat([seen.hidden_BTD[tap][0] for tap in drafter.taps], dim=-1)
    states_BD = plain_block(drafter, features_TF[:ROOT], tokens[ROOT])
    hidden_KD = states_BD if shift_label else states_BD[1:]
    num_drafts = len(hidden_KD)
    base_KV = target.model.get_output_embeddings()(hidden_KD)
    before = tokens[ROOT : ROOT + num_drafts]
    found_KV = all_logits(target, drafter, tokens)[ROOT]
    wanted_KV = base_KV + plain_corrections(drafter, hidden_KD, before, uncorrected=uncorrected)
    torch.testing.assert_close(found_KV, wanted_KV, rtol=1e-5, atol=1e-6)
    assert not uncorrected or (found_KV - base_KV)[:uncorrected].abs().max() < 1e-6
    # The controls: the tokens that the slots predict in place of those before, and one corrected slot less.
    late = plain_corrections(drafter, hidden_KD, tokens[ROOT + 1 : ROOT + 1 + num_drafts], uncorrected=uncorrected)
    assert (found_KV - base_KV - late).abs().max() > 1e-2
    fewer = plain_corrections(drafter, hidden_KD, before, uncorrected=uncorrected + 1)
    assert (found_KV - base_KV - fewer).abs().max() > 1e-2


@BOTH
def test_a_token_moves_only_the_slots_after_it(target, shift_label):
    drafter, tokens, place = made(target, shift_label=shift_label), text(), 1
    new = [*tokens]
    new[ROOT + place] = (tokens[ROOT + place] + 1) % 250
    before_KV, after_KV = (all_logits(target, drafter, each)[ROOT] for each in (tokens, new))
    # In both conventions draft token k, from 0, stands k + 1 places after the root.
    assert torch.equal(before_KV[:place], after_KV[:place])
    # All later ones move: the recurrent state has read the token.
    moved_K = (before_KV - after_KV)[place:].abs().amax(dim=-1)
    assert moved_K.min() > 1e-3


# ---------------------------------------------------------------- the loss and its schedule


def at_step(batch: DraftBatch, step: int, num_steps: int) -> DraftBatch:
    return replace(batch, step=step, num_steps=num_steps)


def gradients(drafter: Any, batch: DraftBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the total of a training step, and its gradients by parameter."""
    total = batch_loss(drafter.train(), losses.build(CrossEntropySettings()), batch, vocab_size=257).total
    named = {name: weight for name, weight in drafter.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return total, {name: one for name, one in zip(named, found, strict=True) if one is not None}


@BOTH
def test_the_first_step_is_that_of_dflash(target, shift_label):
    drafter = made(target, shift_label=shift_label, anchors=64)
    batch = batch_of(target, drafter, text(), text(9, seed=5))
    wanted, of_dflash = gradients(dflash_of(target, drafter), at_step(batch, 0, 10))
    total, found = gradients(drafter, at_step(batch, 0, 10))
    torch.testing.assert_close(total, wanted)
    for name, gradient in of_dflash.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)
    own = [name for name in found if name.startswith(("prefix_gru", "embed_proj"))]
    assert len(own) == 4
    assert not any(found[name].any() for name in own)
    # The control: in the middle both differ.
    _, later = gradients(drafter, at_step(batch, 5, 10))
    assert all(later[name].abs().max() > 1e-6 for name in own)
    assert (later["fc.weight"] - of_dflash["fc.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("step", [0, 3, 9])
def test_the_loss_is_the_published_mixture(target, step):
    """(1 - c) CE(corrected) + c CE(base), weights exp(-(d - 1) / gamma), from the definitions; c = 1 - step / 9."""
    drafter, tokens = made(target, gamma=3.0, anchors=64, draft_vocab_size=None), text()
    batch = batch_of(target, drafter, tokens)
    corrected_TKV, base_TKV = (
        all_logits(target, each.eval(), tokens) for each in (drafter, dflash_of(target, drafter))
    )
    sums: list[Any] = []
    for logits_TKV in (corrected_TKV, base_TKV):
        sums.append(
            sum(
                -math.exp(-place / 3.0) * logits_TKV[root, place].log_softmax(-1)[tokens[root + place + 1]]
                for root in range(len(tokens) - 1)
                for place in range(min(logits_TKV.shape[1], len(tokens) - 1 - root))
            )
        )
    share = 1 - step / 9
    wanted = (1 - share) * sums[0] + share * sums[1]
    total, _ = gradients(drafter, at_step(batch, step, 10))
    torch.testing.assert_close(total.detach().double(), wanted.detach(), rtol=1e-5, atol=0)
    swapped = share * sums[0] + (1 - share) * sums[1]
    assert abs(float(total.detach() - swapped.detach())) > 1e-3  # the control


def test_the_share_of_the_base_logits_falls_from_one_to_zero(target):
    drafter = made(target).train()
    batch = batch_of(target, drafter, text())
    shares = [drafter.base_share(at_step(batch, step, 11)) for step in range(11)]
    assert (shares[0], shares[-1]) == (1.0, 0.0)
    assert shares == pytest.approx([1 - step / 10 for step in range(11)])
    assert drafter.base_share(at_step(batch, 0, 1)) == 1.0
    # A resumed training has the same steps of the same whole: nothing else is read.
    drafter.own["base_decay_ratio"] = 0.5
    assert [drafter.base_share(at_step(batch, step, 10)) for step in (0, 2, 4, 5, 9)] == [1.0, 0.5, 0.0, 0.0, 0.0]
    # An endless training, and validation.
    assert drafter.base_share(at_step(batch, 0, 0)) == 0.0
    assert drafter.eval().base_share(at_step(batch, 0, 10)) == 0.0
    assert drafter(at_step(batch, 0, 10)).beside == ()


def test_a_training_tells_its_drafter_how_many_steps_it_has(target):
    drafter = made(target).train()
    module = DistillModule(
        drafter, CrossEntropy(), target=target, settings=TrainSettings(max_steps=7), vocab_size=target.vocab_size
    )
    planned = module.planned(replace(batch_of(target, drafter, text()), step=3))
    assert (planned.step, planned.num_steps) == (3, 7)
    assert drafter.base_share(planned) == 0.5


# ---------------------------------------------------------------- sizes, folder, settings


@BOTH
def test_parameters_are_those_of_the_formula(target, shift_label):
    drafter = made(target, shift_label=shift_label)
    width, vocab = drafter.config["hidden_size"], target.vocab_size
    count = {
        name: sum(p.numel() for p in each.parameters())
        for name, each in (("ours", drafter), ("dflash", dflash_of(target, drafter)))
    }
    wanted = 3 * STATE * (width + STATE) + RANK * (width + STATE) + vocab * RANK
    assert count["ours"] - count["dflash"] == wanted


def test_published_size():
    """Qwen3-8B: the number of the published heads."""
    with torch.device("meta"):
        parts = [
            PrefixGru(input_size=4096, hidden_size=1024),
            correction(hidden_size=4096, state_size=1024, rank=256, num_tokens=151936),
        ]
    assert sum(p.numel() for part in parts for p in part.parameters()) == 55_934_976


@BOTH
def test_the_folder_has_the_published_layout_and_reads_back(target, shift_label, tmp_path):
    drafter = made(target, shift_label=shift_label)
    drafter.save(tmp_path)
    width, vocab, inner = 32, 257, drafter.config["intermediate_size"]
    queries, keys = 4 * 6, 2 * 6
    published = {
        "fc.weight": [width, 2 * width],
        "hidden_norm.weight": [width],
        "norm.weight": [width],
        "prefix_gru.weight_ih_l0": [3 * STATE, width],
        "prefix_gru.weight_hh_l0": [3 * STATE, STATE],
        "embed_proj.0.weight": [RANK, width + STATE],
        "embed_proj.2.weight": [vocab, RANK],
    }
    for i in range(2):
        published |= {
            f"layers.{i}.input_layernorm.weight": [width],
            f"layers.{i}.post_attention_layernorm.weight": [width],
            f"layers.{i}.self_attn.q_proj.weight": [queries, width],
            f"layers.{i}.self_attn.k_proj.weight": [keys, width],
            f"layers.{i}.self_attn.v_proj.weight": [keys, width],
            f"layers.{i}.self_attn.o_proj.weight": [width, queries],
            f"layers.{i}.self_attn.q_norm.weight": [6],
            f"layers.{i}.self_attn.k_norm.weight": [6],
            f"layers.{i}.mlp.gate_proj.weight": [inner, width],
            f"layers.{i}.mlp.up_proj.weight": [inner, width],
            f"layers.{i}.mlp.down_proj.weight": [width, inner],
        }
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == published
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["block_size"]) == (["DominoDraftModel"], "qwen3", 4)
    assert config["dflash_config"] == {
        **{"projector_type": "domino", "emb_dim": RANK, "gru_hidden_dim": STATE, "pure_draft_prefix_len": 1},
        **{"shift_label": shift_label, "mask_token_id": 256, "target_layer_ids": [0, 2], "causal": False},
    }
    again = Domino.load(tmp_path, target, dtype="float64")
    assert torch.equal(all_logits(target, drafter, text()), all_logits(target, again, text()))
    assert again.own == drafter.own


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gru_hidden_dim", 0, "dflash_config.gru_hidden_dim must be a whole number of 1..65536, got 0"),
        ("emb_dim", "5", "dflash_config.emb_dim must be a whole number of 1..65536, got '5'"),
        ("projector_type", None, "dflash_config.projector_type must be 'domino', got None"),
        ("pure_draft_prefix_len", 4, "dflash_config.pure_draft_prefix_len must be a whole number of 0..3, got 4"),
        ("shift_label", False, "dflash_config.shift_label must be sample_from_anchor, True"),
    ],
)
def test_a_wrong_field_of_the_folder_is_named(target, tmp_path, key, value, message):
    drafter = made(target)
    drafter.config["dflash_config"] |= {key: value}
    drafter.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded") as raised:
        Domino.load(tmp_path, target)
    assert message in str(raised.value)


def test_settings_are_checked():
    assert DominoSettings().check() == []
    (problem,) = DominoSettings(block_size=4, sample_from_anchor=False, pure_draft_prefix_len=3).check()
    assert problem.startswith("pure_draft_prefix_len: must be less than the 3 draft tokens")
    problems = DominoSettings(checkpoint="x", gru_hidden_dim=3, emb_dim=4, pure_draft_prefix_len=0).check()
    assert problems == [f"{name}: the checkpoint fixes it: leave it out" for name in FIELDS]
