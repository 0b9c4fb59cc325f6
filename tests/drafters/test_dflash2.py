"""DFlash2: its convolutions and selector by their definitions, what a block may depend on, the losses, folder, sizes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Sampling
from drafttrain.drafters import drafters
from drafttrain.drafters.dflash2.convolution import DynamicConvolution
from drafttrain.drafters.dflash2.dflash2 import FIELDS, DFlash2, DFlash2Settings
from drafttrain.drafters.dflash2.selector import CandidateSelector
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.losses import losses
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.step import BatchLoss, batch_loss
from drafttrain.target_model import Target
from tests.drafters.block_models import SETTINGS, block_drafter, block_target, plain_block, plain_convolution
from tests.drafters.test_dspark import all_logits, batch_of, text
from tests.eval.test_domino_engine import drafted

RANK, TOP = 5, 6
DFLASH2: dict[str, Any] = {"conv_group_size": 8, "selector_rank": RANK, "selector_top_k": TOP}
ROOT = 5


@pytest.fixture(scope="module")
def target() -> Target:
    return block_target()


def made(target: Target, **settings: Any) -> Any:
    """Return a drafter whose selector matters."""
    drafter = block_drafter(target, "dflash2", **DFLASH2 | settings)
    selector = drafter.candidate_selector
    for number, codebook in enumerate([selector.predecessor_codebook, selector.successor_codebook]):
        torch.nn.init.normal_(codebook, generator=torch.Generator().manual_seed(number))
    return drafter


def new(kind: str, target: Target, **settings: Any) -> Any:
    """Return a drafter as training starts from it, always from the same random numbers."""
    torch.manual_seed(3)
    entry: Any = drafters.entry(kind)
    return entry.component.create(entry.settings(**SETTINGS | settings), target=target, tokenizer=target.tokenizer)


def base_logits(target: Target, drafter: Any, tokens: list[int]) -> Tensor:
    """Return U_TKV, the slots' own logits."""
    drafted = drafter.eval()(batch_of(target, drafter, tokens))
    width = drafter.config["hidden_size"]
    states = [drafted.states_BTD[depth][0, :, :width] for depth in sorted(drafted.states_BTD)]
    return torch.stack([drafter.base_head(states_TD, 1) for states_TD in states], dim=1)


def plain_pairs(drafter: Any, hidden_KD: Tensor, before: list[int]) -> Tensor:
    """Return <A[before] * (H h), B[b]> for all tokens b of every slot."""
    weights = {name.removeprefix("candidate_selector."): weight for name, weight in drafter.state_dict().items()}
    found = []
    for hidden_D, token in zip(hidden_KD, before, strict=True):
        factor = weights["predecessor_codebook"][token] * (weights["hidden_projection.weight"] @ hidden_D)
        found.append(weights["successor_codebook"] @ factor)
    return torch.stack(found)


# ---------------------------------------------------------------- the convolutions


def test_the_convolution_is_that_of_its_definition_and_reads_the_left_neighbour():
    conv = DynamicConvolution(width=6, taps=3, group_size=2).double()
    generator = torch.Generator().manual_seed(0)
    for weight in conv.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    normed_ABD, states_ABD = torch.randn(2, 2, 4, 6, generator=generator, dtype=torch.float64)
    delta = conv.kernel_projection(normed_ABD).unflatten(-1, (2, 3, 3))
    for side in (0, 1):
        found = conv.convolved(states_ABD, delta[:, :, side], side=side)
        arguments = (conv.base_kernel[side], conv.kernel_projection.weight)
        for block in (0, 1):
            here = (states_ABD[block], *arguments, normed_ABD[block])
            torch.testing.assert_close(found[block], plain_convolution(*here, side=side), rtol=0, atol=1e-12)
            # The controls: the right neighbour, and the other side's kernel.
            assert (found[block] - plain_convolution(*here, side=side, neighbour=1)).abs().max() > 0.1
            assert (found[block] - plain_convolution(*here, side=1 - side)).abs().max() > 0.1


def test_no_block_reads_another_one():
    conv = DynamicConvolution(width=6, taps=2, group_size=2).double()
    for weight in conv.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    states_ABD = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    changed_ABD = states_ABD.clone()
    changed_ABD[0, -1] += 1
    identity = lambda states: states  # noqa: E731
    before, after = (conv(states, identity) for states in (states_ABD, changed_ABD))
    assert torch.equal(before[1:], after[1:])
    assert torch.equal(before[0, :-1], after[0, :-1])
    assert (before[0, -1] - after[0, -1]).abs().max() > 0.1
    # The control: over the slots of all blocks as one sequence, the next block's first slot reads the changed one.
    before, after = (conv(states.flatten(0, 1)[None], identity)[0] for states in (states_ABD, changed_ABD))
    assert (before[4] - after[4]).abs().max() > 0.1


@pytest.mark.parametrize("from_anchor", [False, True])
def test_a_block_is_that_of_its_definition(target, from_anchor):
    """Attention, convolutions and pair scores from loops over heads, keys, slots and channels."""
    drafter, tokens = made(target, sample_from_anchor=from_anchor, selector_top_k=257), text()
    seen = batch_of(target, drafter, tokens).target
    features_TF = torch.cat([seen.hidden_BTD[tap][0] for tap in drafter.taps], dim=-1)
    first = 0 if from_anchor else 1
    hidden_KD = plain_block(drafter, features_TF[:ROOT], tokens[ROOT])[first:]
    before = tokens[ROOT : ROOT + len(hidden_KD)]
    base_KV = target.model.get_output_embeddings()(hidden_KD)
    # With all tokens as candidates, the selector is a bigram model on the logits.
    found_KV = all_logits(target, drafter, tokens)[ROOT]
    wanted_KV = base_KV + plain_pairs(drafter, hidden_KD, before)
    torch.testing.assert_close(found_KV, wanted_KV, rtol=1e-5, atol=1e-6)
    # The controls: the right neighbour, the tokens that the slots predict, no pair scores.
    wrong_KD = plain_block(drafter, features_TF[:ROOT], tokens[ROOT], neighbour=1)[first:]
    assert (target.model.get_output_embeddings()(wrong_KD) - base_KV).abs().max() > 1e-2
    late = plain_pairs(drafter, hidden_KD, tokens[ROOT + 1 : ROOT + 1 + len(hidden_KD)])
    assert (found_KV - base_KV - late).abs().max() > 1e-2
    assert (found_KV - base_KV).abs().max() > 1e-2


# ---------------------------------------------------------------- a new drafter is DFlash


def test_a_new_drafter_is_dflash_bit_for_bit(target):
    ours, theirs = (new(kind, target, **of_kind) for kind, of_kind in (("dflash2", DFLASH2), ("dflash", {})))
    own = ours.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.state_dict().items())
    tokens = text()

    def drafts(drafter: Any) -> list[int]:
        policy = FixedLength(FixedLengthSettings(3))
        return drafted(target, drafter.eval(), Sampling(), policy).tokens_N.tolist()

    def loss_of(drafter: Any) -> BatchLoss:
        loss = losses.build(CrossEntropySettings())
        return batch_loss(drafter.train(), loss, batch_of(target, drafter, tokens), vocab_size=257)

    assert torch.equal(base_logits(target, ours, tokens), all_logits(target, theirs.eval(), tokens))
    assert drafts(ours) == drafts(theirs)
    assert torch.equal(loss_of(ours).loss_N, loss_of(theirs).loss_N)
    # The control: with a second tap, or with pair scores, they differ.
    with torch.no_grad():
        ours.layers[0].mlp_conv.base_kernel[0, 1] += 0.5
    assert not torch.equal(base_logits(target, ours, tokens), all_logits(target, theirs.eval(), tokens))
    assert not torch.equal(loss_of(ours).loss_N, loss_of(theirs).loss_N)
    with torch.no_grad():
        ours.layers[0].mlp_conv.base_kernel[0, 1] -= 0.5
        ours.candidate_selector.predecessor_codebook.normal_()
        ours.candidate_selector.successor_codebook.normal_(std=100)
    assert drafts(ours) != drafts(theirs)


# ---------------------------------------------------------------- the candidates


def test_the_candidates_are_the_tokens_with_the_largest_own_logits(target):
    drafter, tokens = made(target), text()
    logits_TKV, base_TKV = all_logits(target, drafter, tokens), base_logits(target, drafter, tokens)
    best_TKk = base_TKV.topk(TOP).indices
    assert torch.equal(logits_TKV.isfinite(), torch.zeros_like(base_TKV, dtype=torch.bool).scatter(-1, best_TKk, True))
    # Among them, the scores of the pairs change the order.
    assert (logits_TKV.argmax(-1) != base_TKV.argmax(-1)).any()


def test_padding_of_the_vocabulary_is_no_candidate():
    """Ids after the tokenizer's last one, whose rows of the head give the largest logits."""
    target = block_target(vocab_size=300)
    drafter = made(target)
    logits_NV = torch.arange(300.0)[None].double()
    found_NV = drafter.correction()(logits_NV, torch.zeros(1, RANK).double())
    assert target.num_tokens == 257
    assert found_NV.isfinite().nonzero()[:, 1].tolist() == list(range(257 - TOP, 257))


def test_a_token_moves_the_next_slot_only(target):
    drafter, tokens = made(target, selector_top_k=257), text()
    changed = [*tokens]
    changed[ROOT + 1] = (tokens[ROOT + 1] + 1) % 250
    before_KV, after_KV = (all_logits(target, drafter, each)[ROOT] for each in (tokens, changed))
    assert [(before_KV - after_KV)[k].abs().max() > 1e-3 for k in range(3)] == [False, True, False]


# ---------------------------------------------------------------- the losses


def test_the_loss_is_the_slots_own_and_that_of_the_selector_where_it_can_select(target):
    """Both with weights exp(-(d - 1) / gamma), from the definitions; and the count of labels that are candidates."""
    drafter, tokens = made(target, gamma=3.0, anchors=64, selector_top_k=100, selector_loss_weight=0.5), text()
    base_TKV, selected_TKV = (of(target, drafter, tokens).detach() for of in (base_logits, all_logits))
    own, chosen, found, count = 0.0, 0.0, 0, 0
    for root in range(len(tokens) - 1):
        for place in range(min(3, len(tokens) - 1 - root)):
            weight, label = math.exp(-place / 3.0), tokens[root + place + 1]
            own -= weight * float(base_TKV[root, place].log_softmax(-1)[label])
            count += 1
            if label in base_TKV[root, place].topk(100).indices.tolist():
                found += 1
                chosen -= weight * float(selected_TKV[root, place].log_softmax(-1)[label])
    assert 0 < found < count
    batch = batch_of(target, drafter, tokens)
    made_ = batch_loss(drafter.train(), losses.build(CrossEntropySettings()), batch, vocab_size=257)
    assert float(made_.total.detach()) == pytest.approx(own + 0.5 * chosen, rel=1e-5)
    total, rows = made_.figures["candidate_recall"]
    assert (int(total), rows) == (found, count)
    # The controls: without the weight, and with the other rows, whose labels have no probability.
    assert abs(float(made_.total.detach()) - own - chosen) > 1e-2
    assert float(selected_TKV.log_softmax(-1).min()) == -math.inf
    made_.total.backward()
    gradients = {name: weight.grad for name, weight in drafter.named_parameters() if weight.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for name, gradient in gradients.items() if "selector" in name or "conv" in name)


def test_depths_without_a_row_add_nothing(target):
    """A text of two tokens has rows of depth 1 only; excluded tokens have logits of -inf."""
    drafter = made(target).train()
    total = batch_loss(
        drafter, losses.build(CrossEntropySettings()), batch_of(target, drafter, [3, 4]), vocab_size=257
    ).total
    assert total.isfinite()
    total.backward()
    assert all(weight.grad.isfinite().all() for weight in drafter.parameters() if weight.grad is not None)


# ---------------------------------------------------------------- sizes, folder, settings


def test_published_sizes():
    """Qwen3-8B with five layers: what the convolutions and the selector add."""
    with torch.device("meta"):
        conv = DynamicConvolution(width=4096, taps=2, group_size=16)
        selector = CandidateSelector(vocab_size=151936, draft_vocab_size=151936, hidden_size=4096, rank=256, top_k=16)
    count = [sum(weight.numel() for weight in part.parameters()) for part in (conv, selector)]
    assert (2 * 5 * count[0], count[1]) == (42_106_880, 78_839_808)


def test_the_folder_has_the_published_layout_and_reads_back(target, tmp_path):
    drafter = made(target)
    drafter.save(tmp_path)
    dflash = block_drafter(target, "dflash").state_dict()
    further = {
        "candidate_selector.predecessor_codebook": [257, RANK],
        "candidate_selector.successor_codebook": [257, RANK],
        "candidate_selector.hidden_projection.weight": [RANK, 32],
    }
    for name in (f"layers.{i}.{part}_conv" for i in range(2) for part in ("attention", "mlp")):
        further |= {f"{name}.base_kernel": [2, 2, 32], f"{name}.kernel_projection.weight": [2 * 2 * 4, 32]}
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {name: list(tensor.shape) for name, tensor in dflash.items()} | further
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["DFlash2DraftModel"], "qwen3")
    assert config["dflash_config"] == {
        **{"mask_token_id": 256, "target_layer_ids": [0, 2], "causal": False},
        **{"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": RANK, "selector_top_k": TOP},
    }
    again = DFlash2.load(tmp_path, target, dtype="float64")
    assert torch.equal(all_logits(target, drafter, text()), all_logits(target, again, text()))
    assert again.own == drafter.own


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("selector_rank", 0, "dflash_config.selector_rank must be a whole number of 1..65536, got 0"),
        ("selector_top_k", "6", "dflash_config.selector_top_k must be a whole number of 1..65536, got '6'"),
        ("conv_kernel_size", 5, "dflash_config.conv_kernel_size must be at most block_size, 4, got 5"),
        ("conv_group_size", 5, "dflash_config.conv_group_size must divide hidden_size, 32, got 5"),
    ],
)
def test_a_wrong_field_of_the_folder_is_named(target, tmp_path, key, value, message):
    drafter = made(target)
    drafter.config["dflash_config"] |= {key: value}
    drafter.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded") as raised:
        DFlash2.load(tmp_path, target)
    assert message in str(raised.value)


def test_settings_are_checked(target):
    assert DFlash2Settings().check() == []
    (problem,) = DFlash2Settings(block_size=4, conv_kernel_size=5).check()
    assert problem == "conv_kernel_size: at most the 4 slots of a block, got 5"
    changed = {"conv_kernel_size": 1, "conv_group_size": 4, "selector_rank": 3, "selector_top_k": 4}
    problems = DFlash2Settings(checkpoint="x", **changed).check()
    assert problems == [f"{name}: the checkpoint fixes it: leave it out" for name in FIELDS]
    with pytest.raises(CheckpointError, match="conv_group_size: must divide the target's width 32, got 5"):
        new("dflash2", target, conv_group_size=5)
