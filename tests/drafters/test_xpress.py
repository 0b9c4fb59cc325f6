"""XPress: its head by its definition, passes against a draft from left to right, the loss, folder, sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError
from drafttrain.core.piece_size import PieceSize
from drafttrain.drafters.xpress import xpress
from drafttrain.drafters.xpress.passes import Candidates, passes
from drafttrain.drafters.xpress.refiner import CausalMix, RefinerHead
from drafttrain.drafters.xpress.xpress import FIELDS, XPress, XPressSettings
from drafttrain.losses import losses
from drafttrain.losses.ce import CrossEntropySettings
from drafttrain.losses.step import batch_loss
from drafttrain.target_model import Target
from tests.drafters.block_models import block_drafter, block_target, plain_block
from tests.drafters.test_dspark import all_logits, batch_of, text

RANK, INNER, K = 5, 7, 5
HEAD: dict[str, Any] = {"rank": RANK, "mlp_hidden": INNER, "block_size": K + 1}
ROOT = 5


@pytest.fixture(scope="module")
def target() -> Target:
    return block_target()


def made(target: Target, **settings: Any) -> Any:
    """Return a drafter whose head matters: corrections as large as the base logits."""
    drafter = block_drafter(target, "xpress", **HEAD | settings)
    with torch.no_grad():
        for number, (name, weight) in enumerate(drafter.xpress_head.named_parameters()):
            std = 0.6 if "mix" in name else 1.0 if name.startswith(("w1", "w2")) else 0.4
            weight.normal_(std=std, generator=torch.Generator().manual_seed(number))
    return drafter.eval()


def dflash_of(target: Target, drafter: Any, **settings: Any) -> Any:
    """Return the DFlash drafter with the same block."""
    dflash = block_drafter(target, "dflash", block_size=K + 1, **settings)
    dflash.load_state_dict({name: drafter.state_dict()[name] for name in dflash.state_dict()})
    return dflash.eval()


def states_at(target: Target, drafter: Any, tokens: list[int], root: int) -> Tensor:
    """Return states_BD of a block, from loops over heads, keys and slots."""
    seen = batch_of(target, drafter, tokens).target
    features_TF = torch.cat([seen.hidden_BTD[tap][0] for tap in drafter.taps], dim=-1)
    return plain_block(drafter, features_TF[:root], tokens[root])


def plain_corrections(
    drafter: Any, states_BD: Tensor, before: list[int], *, full: bool = False, own_slots: bool = False
) -> Tensor:
    """Return correction_KV of the slots that predict, from the published definition, slot by slot.

    Args:
        before: The token before that of each slot, the root's included.
        full: The wrong variant: slots also read later ones.
        own_slots: The wrong variant: the mean is over the slots that predict.
    """
    weights = {
        name.removeprefix("xpress_head.").removesuffix(".weight"): weight
        for name, weight in drafter.state_dict().items()
        if name.startswith("xpress_head.")
    }
    mean_D, found, z = states_BD[int(own_slots) :].mean(0), [], []
    for state_D, token in zip(states_BD, before, strict=True):
        seen = torch.cat([weights["down_h"] @ state_D, weights["down_g"] @ mean_D, weights["w1"][token]])
        z.append(weights["in_proj"] @ seen)
    for b in range(len(states_BD)):
        u = z[b].clone()
        for j in range(len(states_BD) if full else b + 1):
            u = u + weights["mix.L"][:, b, j] * z[j]
        inner = silu(weights["mlp.gate_proj"] @ u) * (weights["mlp.up_proj"] @ u)
        found.append(weights["w2"] @ (u + weights["mlp.down_proj"] @ inner))
    return torch.stack(found[1:])


def plain_passes(drafter: Any, target: Target, states_BD: Tensor, root: int, *, count: int) -> list[list[int]]:
    """Return the tokens before the first pass and after each."""
    base_KV = target.model.get_output_embeddings()(states_BD[1:])
    found = [base_KV.argmax(-1).tolist()]
    for _ in range(count):
        logits_KV = base_KV + plain_corrections(drafter, states_BD, [root, root, *found[-1][:-1]])
        found.append(logits_KV.argmax(-1).tolist())
    return found


def left_to_right(drafter: Any, target: Target, states_BD: Tensor, root: int) -> list[int]:
    """Return the chain in which each token is the argmax after the tokens before it."""
    base_KV, chain = target.model.get_output_embeddings()(states_BD[1:]), []
    for place in range(K):
        before = [root, root, *chain, *[0] * (K - 1 - place)]
        correction_V = plain_corrections(drafter, states_BD, before)[place]
        chain.append(int((base_KV[place] + correction_V).argmax()))
    return chain


def own_passes(drafter: Any, target: Target, states_BD: Tensor, root: int, *, count: int) -> list[list[int]]:
    """Return the same as `plain_passes` from the drafter's code."""
    head: RefinerHead = drafter.xpress_head
    hidden_1KE = head.packed(states_BD[None])
    base_1KV = target.model.get_output_embeddings()(states_BD[None, 1:])
    root_1r = head.embed(torch.tensor([root]), dtype=torch.float64)
    found = islice(passes(head, Candidates(base_1KV, head.w2), hidden_1KE, root_1r), count + 1)
    return [tokens_1K[0].tolist() for _, tokens_1K in found]


# ---------------------------------------------------------------- the definition


def test_without_the_last_matrix_it_is_dflash(target):
    drafter, tokens = made(target), text()
    corrected = all_logits(target, drafter, tokens)
    slots_own = all_logits(target, dflash_of(target, drafter), tokens)
    torch.nn.init.zeros_(drafter.xpress_head.w2.weight)
    torch.testing.assert_close(all_logits(target, drafter, tokens), slots_own, rtol=0, atol=1e-12)
    assert (corrected - slots_own).abs().max() > 1e-1  # the control: it is not 0


def test_a_new_head_has_the_published_start(target):
    """All matrices of deviation 0.02, w2 too, so that it is not DFlash; a mixer of zeros."""
    settings = XPressSettings(num_layers=1, mask_token_id=256, rank=40, mlp_hidden=60)
    head = XPress.create(settings, target=target, tokenizer=None).xpress_head
    assert not head.mix.L.any()
    assert torch.equal(head.mix(), torch.eye(16).expand(40, 16, 16))
    stds = [weight.std() for name, weight in head.named_parameters() if name != "mix.L"]
    assert len(stds) == 8
    torch.testing.assert_close(torch.stack(stds), torch.full((8,), 0.02), rtol=0.1, atol=0)


def test_all_slots_at_once_are_the_definition(target):
    drafter, tokens = made(target), text()
    states_BD = states_at(target, drafter, tokens, ROOT)
    base_KV = target.model.get_output_embeddings()(states_BD[1:])
    found_KV = all_logits(target, drafter, tokens)[ROOT]
    before = [tokens[ROOT], *tokens[ROOT : ROOT + K]]
    torch.testing.assert_close(found_KV, base_KV + plain_corrections(drafter, states_BD, before), rtol=1e-5, atol=1e-6)
    # The controls: the token before the root, the tokens that the slots predict, a mixer that is full, another mean.
    wrong = [
        plain_corrections(drafter, states_BD, tokens[ROOT - 1 : ROOT + K]),
        plain_corrections(drafter, states_BD, tokens[ROOT : ROOT + K + 1]),
        plain_corrections(drafter, states_BD, before, full=True),
        plain_corrections(drafter, states_BD, before, own_slots=True),
    ]
    for correction_KV in wrong:
        assert (found_KV - base_KV - correction_KV).abs().max() > 1e-2


def test_a_token_moves_only_the_slots_after_it(target):
    drafter, tokens, place = made(target), text(), 2
    new = [*tokens]
    new[ROOT + place] = (tokens[ROOT + place] + 1) % 250
    before_KV, after_KV = (all_logits(target, drafter, each)[ROOT] for each in (tokens, new))
    assert torch.equal(before_KV[:place], after_KV[:place])
    assert (before_KV - after_KV)[place:].abs().amax(dim=-1).min() > 1e-3


def test_steps_from_slot_to_slot_have_the_factors_of_all_slots(target):
    head: RefinerHead = made(target).xpress_head
    generator = torch.Generator().manual_seed(1)
    hidden_AKE = head.packed(torch.randn(3, K + 1, 32, dtype=torch.float64, generator=generator))
    embedded_AKr = torch.randn(3, K, RANK, dtype=torch.float64, generator=generator)
    state, found = head.start(hidden_AKE[:, 0]), []
    for place in range(K):
        factor, state = head.step(place, hidden_AKE[:, place], embedded_AKr[:, place], state)
        found.append(factor)
    wanted = head.factors(hidden_AKE, embedded_AKr)
    torch.testing.assert_close(torch.stack(found, dim=1), wanted, rtol=0, atol=1e-12)
    # Fewer slots have the same factors.
    short = head.factors(hidden_AKE[:, :2], embedded_AKr[:, :2])
    torch.testing.assert_close(short, wanted[:, :2], rtol=0, atol=1e-12)


# ---------------------------------------------------------------- passes


class FullMix(CausalMix):
    """The wrong variant: slots also read later ones."""

    def forward(self) -> Tensor:
        return self.L + torch.eye(self.L.shape[-1], dtype=self.L.dtype)


def test_as_many_passes_as_tokens_are_the_draft_from_left_to_right(target):
    """Pass p has p right tokens or more, and what is right stays; with a full mixer blocks have not settled."""
    drafter, right_of_pass = made(target), torch.zeros(K + 1, dtype=torch.long)
    drafter_full = made(target)
    drafter_full.xpress_head.mix = FullMix(RANK, K + 1).double()
    drafter_full.load_state_dict(drafter.state_dict())
    restless = 0
    for seed in range(6):
        tokens = text(5, seed=seed)
        states_BD = states_at(target, drafter, tokens, 3)
        found = own_passes(drafter, target, states_BD, tokens[3], count=K + 2)
        assert found == plain_passes(drafter, target, states_BD, tokens[3], count=K + 2)
        chain = left_to_right(drafter, target, states_BD, tokens[3])
        for number, of_pass in enumerate(found[: K + 1]):
            right = next((i for i, (a, b) in enumerate(zip(of_pass, chain, strict=True)) if a != b), K)
            assert right >= number
            right_of_pass[number] += right
        assert found[K] == found[K + 1] == found[K + 2] == chain
        *_, last, more = own_passes(drafter_full, target, states_BD, tokens[3], count=K + 1)
        restless += last != more
    # The controls: one pass is not enough, nor are as many passes of a head that looks ahead.
    assert right_of_pass[1] < right_of_pass[2] < 6 * K
    assert restless


@pytest.mark.parametrize("count", [1, 3, 257])
def test_candidates_are_the_likeliest_before_any_correction(target, count):
    """The chain is that of logits which are -inf for all other tokens; of all tokens it is exact, of one the block's own."""
    drafter, tokens = made(target), text()
    head: RefinerHead = drafter.xpress_head
    states_BD = states_at(target, drafter, tokens, ROOT)
    base_1KV = target.model.get_output_embeddings()(states_BD[None, 1:])
    best = base_1KV.topk(count, dim=-1).indices
    allowed_1KV = torch.full_like(base_1KV, float("-inf")).scatter(-1, best, 0.0)
    hidden_1KE = head.packed(states_BD[None])
    root_1r = head.embed(torch.tensor(tokens[ROOT : ROOT + 1]), dtype=torch.float64)
    few, masked, exact = (
        list(islice(passes(head, candidates, hidden_1KE, root_1r), K + 1))
        for candidates in (
            Candidates.best(base_1KV, head.w2, count=count),
            Candidates(base_1KV + allowed_1KV, head.w2),
            Candidates(base_1KV, head.w2),
        )
    )
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(few, masked, strict=True))
    factors_1Kr = few[-1][0]
    assert factors_1Kr is not None
    logits_1KV = Candidates.best(base_1KV, head.w2, count=count).logits(factors_1Kr, size=257)
    torch.testing.assert_close(logits_1KV, base_1KV + allowed_1KV + head.w2(factors_1Kr))
    same_as_exact = all(torch.equal(a, b) for (_, a), (_, b) in zip(few, exact, strict=True))
    assert same_as_exact == (count == 257)
    assert (count == 1) == all(torch.equal(one, few[0][1]) for _, one in few)


# ---------------------------------------------------------------- the loss


def terms(drafter: Any, target: Target, tokens: list[int]) -> dict[str, float]:
    """Return the sums of weighted cross-entropies of all roots of a text from the definitions: text, own, base."""
    found = dict.fromkeys(("text", "own", "base"), 0.0)
    for root in range(len(tokens) - 1):
        states_BD = states_at(target, drafter, tokens, root)
        base_KV = target.model.get_output_embeddings()(states_BD[1:])
        labels = tokens[root + 1 : root + 1 + K]
        padded = [tokens[root], *tokens[root : root + K], *[0] * K][: K + 1]
        drafts = plain_passes(drafter, target, states_BD, tokens[root], count=drafter.own["own_passes"] - 1)
        logits = {
            "text": [base_KV + plain_corrections(drafter, states_BD, padded)],
            "own": [
                base_KV + plain_corrections(drafter, states_BD, [tokens[root], tokens[root], *one[:-1]])
                for one in drafts
            ],
            "base": [base_KV],
        }
        for name, of_passes in logits.items():
            for logits_KV in of_passes:
                log_q_KV = logits_KV.detach().log_softmax(-1)
                for place, label in enumerate(labels):
                    weight = math.exp(-place / drafter.own["gamma"]) / len(of_passes)
                    found[name] -= weight * float(log_q_KV[place, label])
    return found


def step(drafter: Any, batch: DraftBatch) -> Tensor:
    return batch_loss(drafter.train(), losses.build(CrossEntropySettings()), batch, vocab_size=257).total


def test_the_loss_is_the_published_mixture(target):
    tokens = text(7)
    of = terms(made(target, gamma=3.0), target, tokens)
    for own_weight, base_weight in ((0.3, 0.6), (0.0, 0.0), (0.0, 0.5), (2.0, 0.0)):
        drafter = made(target, gamma=3.0, anchors=64, own_weight=own_weight, base_weight=base_weight)
        total = float(step(drafter, batch_of(target, drafter, tokens)).detach())
        assert total == pytest.approx(of["text"] + own_weight * of["own"] + base_weight * of["base"], rel=1e-5)
        assert drafter.eval()(batch_of(target, drafter, tokens)).beside == ()
    # The controls: the terms are not the same.
    assert min(abs(of[a] - of[b]) for a, b in (("text", "own"), ("own", "base"), ("text", "base"))) > 1


def test_the_gradient_of_drafted_tokens_is_that_of_the_same_tokens_given(target):
    """The gradient of a step is that of the three terms with the drafted tokens as constants, by autograd alone."""
    drafter, tokens = made(target, anchors=64), text(9)
    batch, names = batch_of(target, drafter, tokens), ["fc.weight", "xpress_head.mix.L", "xpress_head.w1.weight"]
    weights = [dict(drafter.named_parameters())[name] for name in names]
    found = torch.autograd.grad(step(drafter, batch), weights)
    drafted = drafter(batch)
    assert len(drafted.beside) == drafter.own["own_passes"] + 1
    total = torch.zeros((), dtype=torch.float64)
    for made_of, *_ in [(drafted,), *((one.drafted,) for one in drafted.beside)]:
        for depth in made_of.states_BTD:
            log_q_AV = made_of.logits_BTV(depth)[0].log_softmax(-1)
            for root in range(len(tokens) - depth):
                total = total - made_of.depth_weights[depth] * log_q_AV[root, tokens[root + depth]]
    wanted = torch.autograd.grad(total, weights)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert other.abs().max() > 1e-4


def test_drafted_tokens_do_not_depend_on_the_parts_of_a_step(target, monkeypatch):
    drafter, tokens = made(target, anchors=64), text()
    batch = batch_of(target, drafter, tokens, text(9, seed=4))
    whole = step(drafter, batch)
    monkeypatch.setattr(xpress, "PIECE_BYTES", PieceSize(on_cpu=4 * 257 * K * 3, elsewhere=1))
    hidden, root = torch.zeros(7, K, 32 + RANK).double(), torch.zeros(7, RANK).double()
    assert len(drafter._parts_of(hidden, root)) == 3
    torch.testing.assert_close(step(drafter, batch), whole)
    # Where ZeRO-3 holds the weights, all ranks make the same number of calls.
    drafter.xpress_head.w2.weight.ds_id = 1
    torch.testing.assert_close(step(drafter, batch), whole)


# ---------------------------------------------------------------- sizes, folder, settings


def test_parameters_are_those_of_the_formula(target):
    drafter = made(target)
    count = {
        name: sum(p.numel() for p in each.parameters())
        for name, each in (("ours", drafter), ("dflash", dflash_of(target, drafter)))
    }
    wanted = 2 * 257 * RANK + 2 * 32 * RANK + 3 * RANK**2 + RANK * (K + 1) ** 2 + 3 * RANK * INNER
    assert count["ours"] - count["dflash"] == wanted


def test_published_size():
    """Qwen3-8B: the number of the published head, most of it the matrices of the vocabulary."""
    with torch.device("meta"):
        head = RefinerHead(vocab_size=151936, hidden_size=4096, block_size=16, rank=256, mlp_hidden=512)
    count = sum(p.numel() for p in head.parameters())
    assert count == 80_543_744
    assert 2 * 151936 * 256 / count == pytest.approx(0.966, abs=5e-4)


def test_the_folder_has_the_published_layout_and_reads_back(target, tmp_path):
    drafter = made(target, num_passes=3, num_candidates=9)
    drafter.save(tmp_path)
    width, vocab = 32, 257
    published = {
        "xpress_head.w1.weight": [vocab, RANK],
        "xpress_head.down_h.weight": [RANK, width],
        "xpress_head.down_g.weight": [RANK, width],
        "xpress_head.in_proj.weight": [RANK, 3 * RANK],
        "xpress_head.mix.L": [RANK, K + 1, K + 1],
        "xpress_head.mlp.gate_proj.weight": [INNER, RANK],
        "xpress_head.mlp.up_proj.weight": [INNER, RANK],
        "xpress_head.mlp.down_proj.weight": [RANK, INNER],
        "xpress_head.w2.weight": [vocab, RANK],
    }
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: list(each.shape) for name, each in tensors.items() if name.startswith("xpress")} == published
    assert tensors.keys() - published.keys() == dflash_of(target, drafter).state_dict().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["block_size"]) == (["Qwen3XPressModel"], "qwen3", 6)
    fields = {key: config[key] for key in config if key.startswith("xpress_")}
    assert fields == {
        **{"xpress_block_size": 6, "xpress_rank": RANK, "xpress_mlp_hidden": INNER},
        **{"xpress_num_passes": 3, "xpress_topc": 9},
    }
    again = XPress.load(tmp_path, target, dtype="float64")
    assert torch.equal(all_logits(target, drafter, text()), all_logits(target, again, text()))
    assert (again.own, again.num_passes, again.num_candidates) == (drafter.own, 3, 9)


def test_entries_above_the_diagonal_have_no_effect(target):
    """The file holds the raw mixer: a loader drops what is above the diagonal, and so does ours."""
    drafter, tokens = made(target), text()
    before = all_logits(target, drafter, tokens)
    with torch.no_grad():
        drafter.xpress_head.mix.L += 3 * torch.ones(K + 1, K + 1).triu(1)
    assert torch.equal(all_logits(target, drafter, tokens), before)
    with torch.no_grad():
        drafter.xpress_head.mix.L += 3 * torch.eye(K + 1)
    assert not torch.equal(all_logits(target, drafter, tokens), before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("xpress_rank", 0, "xpress_rank must be a whole number of 1..65536, got 0"),
        ("xpress_mlp_hidden", "5", "xpress_mlp_hidden must be a whole number of 1..65536, got '5'"),
        ("xpress_num_passes", None, "xpress_num_passes must be a whole number of 1..4096, got None"),
        ("xpress_topc", -1, "xpress_topc must be a whole number of 0.."),
        ("xpress_block_size", 8, "xpress_block_size must be block_size, 6, got 8"),
        ("sample_from_anchor", True, "sample_from_anchor must be false: the root's slot predicts nothing"),
        ("draft_vocab_size", 100, "draft_vocab_size must be null: XPress has the target's vocabulary, got 100"),
    ],
)
def test_a_wrong_field_of_the_folder_is_named(target, tmp_path, key, value, message):
    drafter = made(target)
    drafter.config |= {key: value}
    drafter.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded") as raised:
        XPress.load(tmp_path, target)
    assert message in str(raised.value)


def test_settings_are_checked():
    assert XPressSettings().check() == []
    problems = XPressSettings(sample_from_anchor=True, draft_vocab_size=5).check()
    assert [problem.split(":")[0] for problem in problems] == ["sample_from_anchor", "draft_vocab_size"]
    problems = replace(XPressSettings(), checkpoint="x", rank=3, mlp_hidden=4, num_passes=2, num_candidates=7).check()
    assert problems == [f"{name}: the checkpoint fixes it: leave it out" for name in FIELDS]
