"""DSpark: its heads by their definitions, the walk, what a token may depend on, parameters, folder, losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.config.load import load_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.dspark.dspark import DSpark, DSparkSettings
from drafttrain.drafters.dspark.markov import MARKOV_HEADS
from drafttrain.losses import losses
from drafttrain.losses.align import align
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.confidence import ConfidenceSettings
from drafttrain.losses.step import batch_loss
from drafttrain.losses.tvd import TVDSettings
from drafttrain.losses.weighted_sum import Term, WeightedSumSettings
from drafttrain.target_model import Target
from tests.drafters.block_models import block_drafter, block_target, plain_block

RANK = 5
DSPARK: dict[str, Any] = {"sample_from_anchor": True, "markov_rank": RANK}
HEADS = pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
K = 4
PAPER = WeightedSumSettings(
    [
        Term(CrossEntropySettings(), 0.1),
        Term(TVDSettings(), 1.8),
        Term(ConfidenceSettings(), 1.0),
    ]
)


@pytest.fixture(scope="module")
def target() -> Target:
    return block_target()


def made(target: Target, **settings: Any) -> Any:
    """Return a drafter whose heads matter."""
    drafter = block_drafter(target, "dspark", **DSPARK | settings)
    torch.nn.init.normal_(drafter.markov_head.markov_w1.weight, generator=torch.Generator().manual_seed(7))
    torch.nn.init.normal_(drafter.markov_head.markov_w2.weight, generator=torch.Generator().manual_seed(8))
    for name, weight in drafter.markov_head.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(9))
    return drafter.eval()


def text(length: int = 14, seed: int = 2) -> list[int]:
    return torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(target: Target, drafter: Any, *texts: list[int]) -> DraftBatch:
    """Return a packed batch with everything that training reads."""
    records = [Record(str(i), tokens, [True] * len(tokens)) for i, tokens in enumerate(texts)]
    batch, _ = pack(records, width=sum(map(len, texts)), weight_of_step=1.0)
    seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
    return replace(batch, target=seen, target_rows=target.rows_of(seen))


def all_logits(target: Target, drafter: Any, tokens: list[int]) -> Tensor:
    """Return logits_TKV of training's rows: a block at every slot, teacher-forced."""
    drafted = drafter(batch_of(target, drafter, tokens))
    return torch.stack([drafted.logits_BTV(depth)[0] for depth in sorted(drafted.states_BTD)], dim=1)


def plain_walk(drafter: Any, hidden_KD: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Return (bias_KV, score_K) of a block from the definitions alone, slot by slot.

    Args:
        tokens: The token before each slot's: the root, then the text's.
    """
    weights = drafter.markov_head.state_dict()
    w1, w2 = weights["markov_w1.weight"], weights["markov_w2.weight"]
    state, biases, scores = torch.zeros(RANK, dtype=torch.float64), [], []
    for slot, token in enumerate(tokens):
        hidden, factor = hidden_KD[slot], w1[token]
        if "gate_proj.weight" in weights:
            gate = weights["gate_proj.weight"] @ torch.cat([hidden, w1[token]]) + weights["gate_proj.bias"]
            factor = gate.sigmoid() * factor
        if "joint_proj.weight" in weights:
            joint = weights["joint_proj.weight"] @ torch.cat([state, w1[token], hidden]) + weights["joint_proj.bias"]
            g, c, o = joint[:RANK].sigmoid(), joint[RANK : 2 * RANK].tanh(), joint[2 * RANK :].tanh()
            state, factor = g * state + (1 - g) * c, o
        biases.append(w2 @ factor)
        reads = torch.cat([hidden, w1[token]]) if drafter.config["confidence_head_with_markov"] else hidden
        proj = drafter.confidence_head.proj
        scores.append((proj.weight @ reads + proj.bias)[0])
    return torch.stack(biases), torch.stack(scores)


# ---------------------------------------------------------------- DS1, DS2: the definition


def test_a_new_drafter_is_dflash_whose_root_predicts(target):
    """The Markov head starts with W2 = 0: the same logits as the slots' own."""
    drafter = block_drafter(target, "dspark", **DSPARK)
    assert not DSpark.create(
        DSparkSettings(num_layers=1, mask_token_id=256), target=target, tokenizer=None
    ).markov_head.markov_w2.weight.any()
    torch.nn.init.zeros_(drafter.markov_head.markov_w2.weight)
    dflash = block_drafter(target, "dflash", sample_from_anchor=True)
    dflash.load_state_dict({name: drafter.state_dict()[name] for name in dflash.state_dict()})
    tokens = text()
    slots_own = all_logits(target, dflash.eval(), tokens)
    torch.testing.assert_close(all_logits(target, drafter.eval(), tokens), slots_own, rtol=0, atol=1e-12)
    assert (all_logits(target, made(target), tokens) - slots_own).abs().max() > 1e-1  # the control: W2 is not 0


@HEADS
@pytest.mark.parametrize("with_markov", [True, False])
def test_all_slots_at_once_are_the_walk_over_the_same_tokens(target, head, with_markov):
    """Blocks, biases and predictions from loops over heads, keys and slots."""
    drafter = made(target, markov_head=head, confidence_with_markov=with_markov)
    tokens, slot = text(), 5
    batch = batch_of(target, drafter, tokens)
    features_TF = torch.cat([batch.target.hidden_BTD[tap][0] for tap in drafter.taps], dim=-1)
    hidden_KD = plain_block(drafter, features_TF[:slot], tokens[slot])
    base_KV = target.model.get_output_embeddings()(hidden_KD)
    bias_KV, score_K = plain_walk(drafter, hidden_KD, tokens[slot : slot + K])
    found_TKV = all_logits(target, drafter, tokens)
    torch.testing.assert_close(found_TKV[slot], base_KV + bias_KV, rtol=1e-5, atol=1e-6)
    scores = drafter(batch).confidence_BT
    found_K = torch.stack([scores[depth][0, slot] for depth in sorted(scores)])
    torch.testing.assert_close(found_K, score_K, rtol=1e-5, atol=1e-6)
    # The control: the token that a slot predicts, in place of the one before it.
    late_KV, _ = plain_walk(drafter, hidden_KD, tokens[slot + 1 : slot + 1 + K])
    assert (found_TKV[slot] - base_KV - late_KV).abs().max() > 1e-2


# ---------------------------------------------------------------- DS3: what a token may depend on


@HEADS
def test_a_token_moves_only_the_slots_after_it(target, head):
    drafter = made(target, markov_head=head)
    tokens, root, place = text(), 5, 2
    new = [*tokens]
    new[root + place] = (tokens[root + place] + 1) % 250
    before_KV, after_KV = (all_logits(target, drafter, each)[root] for each in (tokens, new))
    # Slot s predicts the token at root + s + 1.
    assert torch.equal(before_KV[:place], after_KV[:place])
    assert (before_KV[place] - after_KV[place]).abs().max() > 1e-3
    moved_later = (before_KV[place + 1] - after_KV[place + 1]).abs().max() > 1e-6
    assert bool(moved_later) == (head == "rnn")
    if head == "vanilla":
        w1, w2 = (drafter.markov_head.state_dict()[f"markov_w{i}.weight"] for i in (1, 2))
        wanted_V = w2 @ (w1[new[root + place]] - w1[tokens[root + place]])
        torch.testing.assert_close(after_KV[place] - before_KV[place], wanted_V, rtol=0, atol=1e-12)


def test_blocks_of_packed_documents_do_not_meet(target):
    drafter = made(target, markov_head="rnn")
    one, other = text(9), text(8, seed=3)
    together = drafter(batch_of(target, drafter, one, other))
    for tokens, start in ((one, 0), (other, len(one))):
        alone = drafter(batch_of(target, drafter, tokens))
        for depth in range(1, K + 1):
            rows = len(tokens) - depth
            torch.testing.assert_close(
                together.logits_BTV(depth)[0, start : start + rows], alone.logits_BTV(depth)[0, :rows]
            )
            torch.testing.assert_close(
                together.confidence_BT[depth][0, start : start + rows], alone.confidence_BT[depth][0, :rows]
            )


# ---------------------------------------------------------------- DS4, DS5: the published loss


def test_the_published_loss_is_the_sum_of_the_recipe(target):
    """0.1 CE + 0.9 ||p - q||_1 + BCE(c, sg[1 - ||p - q||_1 / 2]), weights exp(-s / gamma), from the definitions."""
    drafter = made(target, gamma=4.0)
    tokens = text()
    batch = batch_of(target, drafter, tokens)
    drafted = drafter(batch)
    total = torch.zeros((), dtype=torch.float64)
    for depth, states in drafted.states_BTD.items():
        for root in range(len(tokens) - depth):
            label = root + depth
            q_V = drafted.head(states[0, root][None], depth)[0].softmax(-1)
            p_V = batch.target_rows.at(torch.tensor([label - 1]))[0].double().softmax(-1)
            l1 = (p_V - q_V).abs().sum()
            c = drafted.confidence_BT[depth][0, root].sigmoid()
            a = 1 - l1.detach() / 2
            value = -0.1 * q_V[tokens[label]].log() + 0.9 * l1 - a * c.log() - (1 - a) * (1 - c).log()
            total = total + math.exp(-(depth - 1) / 4.0) * value
    loss = losses.build(PAPER)
    rows = align(drafted, batch)
    assert len(rows.tokens_N) == sum(len(tokens) - depth for depth in range(1, K + 1))
    found = batch_loss(drafter, loss, batch, vocab_size=257).total
    torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=0)
    weights = [weight for weight in drafter.parameters() if weight.requires_grad]
    ours = torch.autograd.grad(found, weights, allow_unused=True)
    plain = torch.autograd.grad(total, weights, allow_unused=True)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_prediction_trains_the_block_and_w1_and_its_target_is_fixed(target):
    """As published: its input is not detached. What it is compared with is."""
    drafter = made(target)
    batch = batch_of(target, drafter, text())
    batch_loss(drafter, losses.build(ConfidenceSettings()), batch, vocab_size=257).total.backward()
    named = dict(drafter.named_parameters())
    for name in (
        "fc.weight",
        "layers.0.mlp.up_proj.weight",
        "markov_head.markov_w1.weight",
        "confidence_head.proj.weight",
    ):
        assert named[name].grad.abs().max() > 1e-9, name
    # W2 moves q alone, and with it only the acceptance rate.
    w2 = named["markov_head.markov_w2.weight"].grad
    assert w2 is None or not w2.any()


def test_training_reads_the_drawn_roots_only_and_all_of_them_give_the_whole_sum(target):
    drafter = made(target, anchors=64, markov_head="rnn")
    batch = batch_of(target, drafter, text(), text(9, seed=5))
    loss = losses.build(PAPER)
    whole = batch_loss(drafter.eval(), loss, batch, vocab_size=257).total
    drawn = batch_loss(drafter.train(), loss, batch, vocab_size=257).total
    torch.testing.assert_close(drawn, whole)


# ---------------------------------------------------------------- sizes, folder, settings


@HEADS
def test_parameters_are_those_of_the_formula(target, head):
    drafter = made(target, markov_head=head)
    dflash = block_drafter(target, "dflash", sample_from_anchor=True)
    vocab, width, r = target.vocab_size, drafter.config["hidden_size"], RANK
    own = {"vanilla": 0, "gated": (width + r) * r + r, "rnn": (2 * r + width) * 3 * r + 3 * r}[head]
    count = {kind: sum(p.numel() for p in each.parameters()) for kind, each in (("ours", drafter), ("dflash", dflash))}
    assert count["ours"] - count["dflash"] == 2 * vocab * r + own + width + r + 1


def test_published_sizes():
    """Qwen3-8B, rank 256: the numbers of DeepSpec's heads."""
    with torch.device("meta"):
        sizes = {
            name: sum(
                p.numel()
                for p in head(vocab_size=151936, draft_vocab_size=151936, hidden_size=4096, rank=256).parameters()
            )
            for name, head in MARKOV_HEADS.items()
        }
    assert sizes == {"vanilla": 77_791_232, "gated": 77_791_232 + 1_114_368, "rnn": 77_791_232 + 3_539_712}


@HEADS
def test_the_files_read_back(target, head, tmp_path):
    drafter = made(target, markov_head=head, draft_vocab_size=200)
    drafter.save(tmp_path)
    again = DSpark.load(tmp_path, target, dtype="float64")
    tokens = text()
    assert torch.equal(all_logits(target, drafter, tokens), all_logits(target, again, tokens))
    assert (again.confidence_head is None) == (drafter.confidence_head is None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("markov_rank", 0, "markov_rank must be a whole number of 1..65536, got 0"),
        ("markov_head_type", "lstm", "markov_head_type must be one of vanilla, gated, rnn, got 'lstm'"),
        ("enable_confidence_head", "yes", "enable_confidence_head must be true or false, got 'yes'"),
    ],
)
def test_a_wrong_field_of_the_folder_is_named(target, tmp_path, key, value, message):
    drafter = made(target)
    drafter.config = drafter.config | {key: value}
    drafter.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded") as raised:
        DSpark.load(tmp_path, target)
    assert message in str(raised.value)


def test_without_a_confidence_head_there_is_no_prediction(target):
    drafter = made(target, confidence_head=False)
    assert drafter(batch_of(target, drafter, text())).confidence_BT == {}
    assert not DSpark.predicts_confidence(DSparkSettings(confidence_head=False))


def test_a_checkpoint_fixes_its_heads():
    problems = DSparkSettings(checkpoint="x", markov_rank=3, markov_head="rnn").check()
    assert problems == [f"{name}: the checkpoint fixes it: leave it out" for name in ("markov_rank", "markov_head")]


def test_a_recipe_that_reads_a_missing_prediction_is_refused():
    loss = "loss={kind: sum, terms: [{loss: {kind: tvd}}, {loss: {kind: confidence}}]}"
    length = "eval.length={kind: predicted_acceptance}"
    assert load_recipe("tiny_dspark", [length]).drafter.kind == "dspark"
    for recipe, more in (("tiny_dspark", ["drafter.confidence_head=false"]), ("tiny_eagle3", [loss])):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, [*more, length])
        found = [problem for problem in caught.value.problems if "a prediction of acceptance" in problem]
        assert len(found) == 2, caught.value.problems
