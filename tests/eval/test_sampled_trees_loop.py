"""Sampled trees in the loop: greedy identity, output distribution, caches, batches, calibration.

V = vocabulary
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.core.proposals import Context, DrawMode, NodeKind
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters.causal_lm.decoding import decoding_lm
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.drafters.keys_and_values import KeysAndValues
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.dyspec import DySpec, DySpecSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.length.rsd_c import RsdC, RsdCSettings
from drafttrain.eval.length.rsd_s import RsdS, RsdSSettings
from drafttrain.eval.length.sequoia import Sequoia, SequoiaSettings
from drafttrain.eval.length.specinfer import SpecInfer, SpecInferSettings
from drafttrain.eval.length.static_tree import StaticForm, count_nodes
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.growing_layer import GrowingLayer
from tests.drafters.eagle_models import eagle_drafter, eagle_target
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy, noisy, power, small_target

EXACT = 1e-12
CONTEXT = Context("", [0], 1)
BRANCHED = {
    "rsd_c": RsdC(RsdCSettings([3, 2, 1])),
    "rsd_s": RsdS(RsdSSettings(3, depth=4)),
    "dyspec heap": DySpec(DySpecSettings(10, depth=5, width=3)),
    "dyspec threshold": DySpec(DySpecSettings(12, threshold=0.1, depth=4, width=3)),
    "specinfer": SpecInfer(SpecInferSettings([2, 2, 1])),
    "sequoia": Sequoia(SequoiaSettings(9, acceptance=[0.5, 0.2, 0.1])),
}
MANY = [Prompt(str(i), [1 + i % 7, 2, *range(1, 1 + i % 5)]) for i in range(8)]


@functools.cache
def written(new: int = 64) -> list[list[int]]:
    return [greedy(small_target(), prompt, new) for prompt in MANY]


SHORT = ("rsd_s", "dyspec heap")
"""Tried by every `make test`: the others grow like one of them."""


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in BRANCHED]
)
def test_greedy_output_is_the_targets_own_with_random_and_with_opposed_drafters(name):
    """8 prompts, 64 tokens, in float64. The opposed drafter finds most likely what the target finds least likely."""
    target = small_target()
    opposed = copy.deepcopy(target.model)
    with torch.no_grad():
        opposed.lm_head.weight.neg_()
    for drafter in (noisy(target.model, 0.1), opposed):
        found = decode(
            target,
            ChainProposer(drafter, target_vocab_size=8),
            prompts=MANY,
            policy=BRANCHED[name],
            new=64,
            stop_tokens=(),
        )
        assert [one.tokens for one in found] == written()
        assert all(one.start + one.max_depth + 1 <= 64 for g in found for one in g.rounds)
        assert max(one.num_draft_tokens for g in found for one in g.rounds) > 3


@pytest.mark.parametrize("plain", [True, False])
def test_the_cache_is_that_of_a_fresh_prefill_and_rows_are_those_of_each_path_alone(plain, monkeypatch):
    monkeypatch.setattr("drafttrain.drafters.causal_lm.decoding.is_plain", lambda model: plain)
    assert worst_of_cache() < EXACT
    # Control: a path is kept where it was read.
    broken = KeysAndValues if plain else GrowingLayer
    monkeypatch.setattr(broken, "move", lambda self, columns_BW, *, first: None)
    assert worst_of_cache() > 1e-3


@torch.no_grad()
def worst_of_cache() -> float:
    """Return the largest difference of cached keys and of rows of q from those that reading each text alone gives."""
    target = small_target()
    drafter = noisy(target.model, 0.1)
    worst = [0.0]

    class Compared(ChainProposer):
        def propose(self, *given: Any) -> Any:
            for row, context in enumerate(self._contexts):
                length = self._lm.lengths[row]
                assert length >= len(context.tokens) - 3, "what was accepted and read is not read again"
                fresh = decoding_lm(drafter)
                fresh.begin([context.tokens[:length]])
                for ours, alone in zip(keys(self._lm), keys(fresh), strict=True):
                    worst.append(float((ours[row, :, :length] - alone[0, :, :length]).abs().max()))
            proposals = super().propose(*given)
            for context, one in zip(self._contexts, proposals, strict=True):
                path: list[list[int]] = [[]]
                for node, parent in list(enumerate(one.parents_N.tolist()))[1:]:
                    path.append([*path[parent], int(one.tokens_N[node])])
                for node, row in enumerate([] if one.q_row_N is None else one.q_row_N.tolist()):
                    if row >= 0:
                        alone = drafter(torch.tensor([[*context.tokens, *path[node]]])).logits[0, -1].softmax(-1)
                        worst.append(float((one.q_rows_RV[row] - alone).abs().max()))
            return proposals

    proposer = Compared(drafter, target_vocab_size=8)
    policy = RsdS(RsdSSettings(3, depth=4))
    found = decode(target, proposer, prompts=MANY[:4], policy=policy, new=20, temperature=1.0, stop_tokens=())
    assert any(one.num_accepted > 1 for g in found for one in g.rounds)
    return max(worst)


def keys(lm: Any) -> list[torch.Tensor]:
    if isinstance(lm, CachedLM):
        return [layer.keys for layer in lm.cache.hf.layers]
    return [layer.columns.first(max(lm.lengths))[0] for layer in lm._layers]


@pytest.mark.long
def test_the_output_of_a_sampled_tree_has_the_targets_distribution():
    model = small_target().model
    proposer = ChainProposer(noisy(model, 0.15), target_vocab_size=8)
    assert chi_square(model, proposer, 1.0, samples=1000, policy=RsdS(RsdSSettings(2, depth=2))) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", list(BRANCHED))
def test_the_output_of_every_form_has_the_targets_distribution(name, temperature):
    """12,000 texts for each form and temperature: an output at a distance of 0.05 would be found with this power."""
    assert power(12_000, 0.05, 63) > 0.95
    model = small_target().model
    proposer = ChainProposer(noisy(model, 0.15), target_vocab_size=8)
    assert chi_square(model, proposer, temperature, samples=12_000, policy=BRANCHED[name]) > 1e-3


@pytest.mark.slow
def test_control_a_chi_square_finds_draws_that_are_claimed_to_be_independent(monkeypatch):
    """Drawn without replacement, verified as if drawn with it."""
    model = small_target().model
    proposer = ChainProposer(noisy(model, 1.0), target_vocab_size=8)
    policy = RsdC(RsdCSettings([4]))
    honest, claimed = (copy.deepcopy(policy) for _ in range(2))
    form = honest._budget.form
    assert isinstance(form, StaticForm)
    monkeypatch.setattr(
        "drafttrain.drafters.tree_draft.Trees.proposals",
        lambda self: [replace(self._proposal(tree), draw=DrawMode.IID) for tree in self._trees],
    )
    assert chi_square(model, proposer, 1.0, samples=1000, policy=claimed) < 1e-3


def test_without_draws_sampled_forms_draft_fixed_nodes():
    """At temperature 0, and where a drafter drafts greedily at any temperature."""
    model = small_target().model
    for draft, temperature in (("sampled", 0.0), ("greedy", 1.0)):
        proposer = ChainProposer(model, target_vocab_size=8, draft=draft)
        proposer.begin([Context("", [1, 2, 3], 3)], [])
        for policy in BRANCHED.values():
            (one,) = proposer.propose(
                [policy.budget(CONTEXT)], Sampling(temperature), [torch.Generator()], lambda step: True
            )
            assert set(one.kinds_N.tolist()[1:]) == {NodeKind.FIXED.value}
            proposer._lm.keep([[]])


def test_top_k_and_top_p_of_the_drafter_are_those_of_chains():
    model = small_target().model
    sampling, found = Sampling(0.7, top_k=3, top_p=0.9), []
    for policy in (FixedLength(FixedLengthSettings(1)), RsdC(RsdCSettings([2]))):
        proposer = ChainProposer(model, target_vocab_size=8)
        proposer.begin([Context("", [1, 2, 3], 3)], [])
        (one,) = proposer.propose([policy.budget(CONTEXT)], sampling, [torch.Generator()], lambda step: True)
        found.append(one.q_rows_RV[0])
    assert torch.equal(*found)
    assert 1 < int((found[0] > 0).sum()) <= 3


def test_sequoia_is_calibrated_in_the_loop_and_then_stays():
    target = small_target()
    ledger = Ledger()
    policy = Sequoia(SequoiaSettings(max_tokens=12, width=4))
    proposer = ChainProposer(noisy(target.model, 0.1), target_vocab_size=8, listener=ledger.append)
    options = {"prompts": MANY, "policy": policy, "new": 24, "temperature": 1.0, "stop_tokens": ()}
    found = decode(target, proposer, listener=ledger.append, **options)
    assert policy.shape is None
    assert policy.counts.tested[0] > policy.counts.tested[1] > 0
    policy.calibrate(found, ledger.events)
    shape = policy.shape
    assert shape is not None
    found = decode(target, proposer, **options)
    policy.calibrate(found, ledger.events)
    assert policy.shape == shape
    assert max(one.num_draft_tokens for g in found for one in g.rounds) == count_nodes(shape) <= 12


@pytest.mark.parametrize("kind", ["eagle3", pytest.param("eagle", marks=pytest.mark.slow)])
def test_sampled_trees_of_a_batch_are_those_of_each_prompt_alone(kind):
    """Feature drafters: tokens and rounds at temperature 1, together and one by one."""
    target = eagle_target()
    drafter = eagle_drafter(kind, target)
    for name in ("rsd_s", "dyspec heap"):
        options = {"policy": BRANCHED[name], "temperature": 1.0, "new": 8, "stop_tokens": ()}
        together = decode(target, drafter.proposer(target), prompts=PROMPTS, **options)
        alone = [decode(target, drafter.proposer(target), prompts=[prompt], **options)[0] for prompt in PROMPTS]
        assert [(g.tokens, g.rounds) for g in together] == [(g.tokens, g.rounds) for g in alone]
