"""DFlash: the network equals its published definition, in training and in packed rows; what a block may and may not read."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.piece_size import PieceSize
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.drafters.dflash import attention
from drafttrain.drafters.dflash.attention import attend_blocks, later_slots
from drafttrain.drafters.dflash.blocks import Blocks
from drafttrain.drafters.dflash.config import layer_ids, taps_of
from tests.drafters.block_models import SETTINGS, block_drafter, block_target, normed, plain_block, plain_logits
from tests.drafters.eagle_models import packed

LENGTHS = (9, 7, 12)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"sample_from_anchor": True, "draft_vocab_size": 200},
    {"num_layers": 1, "taps": [0]},
]


@pytest.fixture(scope="module")
def target() -> Any:
    return block_target()


def logits_of(drafter: Any, batch: Any) -> torch.Tensor:
    """Return logits_BTKR at every slot."""
    with torch.no_grad():
        drafted = drafter(batch)
        return torch.stack([drafted.logits_BTV(depth) for depth in sorted(drafted.states_BTD)], dim=2)


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("width", [12, 22])  # one document a row, padded; two documents in a row
def test_every_block_of_packed_rows_equals_the_definition(target, settings, width):
    drafter = block_drafter(target, **settings)
    batch, places = packed(target, drafter, LENGTHS, width=width)
    ours = logits_of(drafter, batch)
    for (row, column), length in zip(places, LENGTHS, strict=True):
        tokens = batch.tokens_BT[row, column : column + length].tolist()
        for slot in (0, 1, length - 1):
            plain = plain_logits(drafter, target, tokens, slot)
            # The angles of positions are float32.
            torch.testing.assert_close(ours[row, column + slot], plain, rtol=0, atol=1e-6)


def test_control_a_context_that_passes_the_input_norm_breaks_the_identity(target):
    drafter = block_drafter(target)
    batch, _ = packed(target, drafter, LENGTHS[:1], width=9)
    tokens, ours = batch.tokens_BT[0].tolist(), logits_of(drafter, batch)
    wrong = plain_logits(drafter, target, tokens, 5, norm_context=True)
    assert float((ours[0, 5] - wrong).abs().max()) > 1e-2


def test_control_the_roots_own_feature_in_the_context_breaks_the_identity(target):
    drafter = block_drafter(target)
    batch, _ = packed(target, drafter, LENGTHS[:1], width=9)
    assert batch.target is not None
    features = torch.cat([batch.target.hidden_BTD[tap][0] for tap in drafter.taps], dim=-1)
    tokens, ours = batch.tokens_BT[0].tolist(), logits_of(drafter, batch)
    states = plain_block(drafter, features[:6], tokens[5])
    wrong = drafter.head(drafter.predicting(states[None])[0], 1)
    assert float((ours[0, 5] - wrong).abs().max()) > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_scores_are_those_of_a_mask_built_by_hand(causal, monkeypatch):
    """The sentence of the paper, as four loops: context before the root, in its document; the block's own slots."""
    monkeypatch.setattr(attention, "SCORES", PieceSize(500, 500))  # several pieces
    torch.manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]])
    documents = PackedDocuments.of(positions)
    roots, size, heads, groups, width = torch.tensor([1, 4, 6, 7, 8, 11, 12, 14]), 3, 4, 2, 5
    blocks = Blocks.of(roots, documents, on_host=roots)
    total = positions.numel()
    query = torch.randn(len(roots), heads, size, width, dtype=torch.float64, requires_grad=True)
    own = [torch.randn(len(roots), groups, size, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    context = [torch.randn(groups, total, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    hidden = later_slots(blocks, size) if causal else None
    made = attend_blocks(query, (own[0], own[1]), (context[0], context[1]), blocks, hidden_ABO=hidden)

    document = (positions.flatten() == 0).cumsum(0)
    allowed = torch.zeros(len(roots), size, total + len(roots) * size, dtype=torch.bool)
    for block, root in enumerate(roots.tolist()):
        for slot in range(size):
            for column in range(total):
                allowed[block, slot, column] = bool(document[column] == document[root]) and column < root
            for other in range(len(roots)):
                for place in range(size):
                    allowed[block, slot, total + other * size + place] = block == other and (
                        place <= slot or not causal
                    )
    keys, values = (
        torch.cat([all_slots, each.transpose(0, 1).flatten(1, 2)], dim=1)
        for all_slots, each in zip(context, own, strict=True)
    )
    keys, values = (each.repeat_interleave(heads // groups, dim=0) for each in (keys, values))
    scores = torch.einsum("ahbd,hcd->ahbc", query, keys) / math.sqrt(width)
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)
    wanted = torch.einsum("ahbc,hcd->ahbd", weights, values)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    direction = torch.randn_like(made)
    inputs = [query, *own, *context]
    for ours, theirs in zip(
        torch.autograd.grad((made * direction).sum(), inputs),
        torch.autograd.grad((wanted * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_blocks_of_one_pass_do_not_know_each_other(target):
    """All blocks together have the states of each alone."""
    drafter = block_drafter(target)
    batch, _ = packed(target, drafter, LENGTHS, width=22)
    with torch.no_grad():
        context = [
            (keys[0], values[0])
            for keys, values in drafter.context(
                drafter.features(batch.target).flatten(0, 1)[None], batch.positions_BT.flatten()[None]
            )
        ]
        blocks = Blocks.every(batch.tokens_BT, PackedDocuments.of(batch.positions_BT))
        together = drafter._hidden(batch, blocks, context)
        for size in (1, 5):
            alone = torch.cat([drafter._hidden(batch, part, context) for part in blocks.parts(size)])
            torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ["token", "feature"])
def test_a_block_reads_its_root_and_features_before_it_only(target, what):
    drafter, slot = block_drafter(target), 5
    batch, _ = packed(target, drafter, (12,), width=12)
    assert batch.target is not None
    whole = logits_of(drafter, batch)[0]

    def change(place: int) -> torch.Tensor:
        if what == "token":
            tokens = batch.tokens_BT.clone()
            tokens[0, place] = (tokens[0, place] + 7) % 250
            return logits_of(drafter, replace(batch, tokens_BT=tokens))[0]
        hidden = {tap: states.clone() for tap, states in batch.target.hidden_BTD.items()}
        for states in hidden.values():
            states[0, place] += 1
        return logits_of(drafter, replace(batch, target=TargetOutput(hidden_BTD=hidden)))[0]

    moved = [float((change(place)[slot] - whole[slot]).abs().max()) for place in range(12)]
    reads = {slot} if what == "token" else set(range(slot))
    assert {place for place, distance in enumerate(moved) if distance} == reads
    assert min(moved[place] for place in reads) > 1e-4


@pytest.mark.parametrize("sample_from_anchor", [False, True])
def test_a_causal_block_is_consistent_with_its_prefixes(target, sample_from_anchor):
    """JetSpec's slots do not depend on the size of the block; the control is a block without the flag."""
    for causal in (True, False):
        drafter = block_drafter(target, causal=causal, sample_from_anchor=sample_from_anchor)
        batch, _ = packed(target, drafter, LENGTHS, width=22)
        whole = logits_of(drafter, batch)
        for size in (2, 3):
            drafter.block_size = size
            part = logits_of(drafter, batch)
            distance = float((part - whole[:, :, : part.shape[2]]).abs().max())
            assert distance < 1e-10 if causal else distance > 1e-2


def test_with_one_feature_and_no_fusion_the_context_is_the_normed_feature(target):
    drafter = block_drafter(target, taps=[2])
    with torch.no_grad():
        drafter.fc.weight.copy_(torch.eye(32))
    feature = torch.randn(1, 5, 32, dtype=torch.float64)
    positions = torch.arange(5)[None]
    _, values = drafter.context(feature, positions)[1]
    weight = drafter.layers[1].self_attn.v_proj.weight
    plain = normed(feature, drafter.hidden_norm.weight) @ weight.T
    torch.testing.assert_close(values, plain.unflatten(-1, (2, 6)).transpose(1, 2), rtol=0, atol=1e-12)


def formula(*, width: int, taps: int, layers: int, heads: int, groups: int, size: int, inner: int) -> int:
    """Return the parameters of a drafter without a head."""
    of_layer = 2 * width * heads * size + 2 * width * groups * size + 3 * width * inner + 2 * width + 2 * size
    return taps * width**2 + 2 * width + layers * of_layer


def test_the_parameters_are_those_of_the_formula(target):
    sizes = {"width": 32, "taps": 2, "layers": 2, "heads": 4, "groups": 2, "size": 6, "inner": 64}
    count = lambda drafter: sum(parameter.numel() for parameter in drafter.parameters())  # noqa: E731
    assert count(block_drafter(target)) == formula(**sizes)
    assert count(block_drafter(target, draft_vocab_size=200)) == formula(**sizes) + 200 * 32
    eight_b = {"width": 4096, "taps": 5, "layers": 5, "heads": 32, "groups": 8, "size": 128, "inner": 12288}
    assert formula(**eight_b) == 1_048_626_432


def test_by_default_the_taps_are_z_labs():
    assert layer_ids(taps_of(36, 5)) == [1, 9, 17, 25, 33]
    assert layer_ids(taps_of(36, 1)) == [18]
    assert taps_of(2, 5) == [0, 1]
    assert taps_of(1, 2) == [0]


@pytest.mark.parametrize("changing", range(4))
def test_layer_ids_name_the_same_states_in_every_numbering(changing):
    """Of a target whose blocks but one are identities, all states up to that one's input are the embedding."""
    target = block_target()
    with torch.no_grad():
        for number, block in enumerate(target.model.model.layers):
            if number != changing:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
    text = torch.tensor([[5, 6, 7, 8]])
    positions = torch.arange(4)[None]
    taps = [0, 1, 2, 3]
    seen = target.read(text, positions, TargetNeeds(hidden=tuple(taps)))
    outputs = target.model(text, output_hidden_states=True).hidden_states
    embedding = target.model.model.embed_tokens(text)
    for tap, output in zip(taps, layer_ids(taps), strict=True):
        ours = seen.hidden_BTD[tap]
        # z-lab reads hidden_states[id + 1], the output of block id; vLLM adds 1 to the id and counts states entering a block.
        torch.testing.assert_close(ours, outputs[output + 1], rtol=0, atol=1e-12)
        assert torch.equal(ours, embedding) == (tap <= changing)
    # The control: an id read as the input of that block misses the change of the block before it.
    assert not torch.equal(outputs[changing + 1], outputs[changing])


def test_settings_name_what_is_wrong():
    from drafttrain.drafters.dflash.dflash import DFlashSettings

    wrong = DFlashSettings(taps=[3, 1], num_heads=4, num_kv_heads=3, head_dim=7, block_size=1)
    assert [line.partition(":")[0] for line in wrong.check()] == ["taps", "num_kv_heads", "head_dim", "block_size"]
    assert not DFlashSettings(**SETTINGS).check()
