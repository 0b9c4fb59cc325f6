"""Early exit in the loop: the target's own output, its own cache, and d l + L passes of a block in a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.proposals import Budget, Context
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Sampling
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.ledger import Ledger
from drafttrain.eval.length.confidence import Confidence, ConfidenceSettings
from drafttrain.eval.length.fixed import FixedLength, FixedLengthSettings
from drafttrain.eval.proposers import Surroundings, make
from drafttrain.eval.proposers.early_exit import EarlyExitProposerSettings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, chi_square, decode, greedy

EXIT, BLOCKS = 2, 4


def wrapped(model: Any) -> Target:
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


def idle_from(model: Any, exit_layer: int) -> Any:
    """Let the blocks from the exit on add nothing."""
    with torch.no_grad():
        for block in blocks(model)[exit_layer:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


def exiting(target: Target, listener: Any = None, **settings: Any) -> Any:
    chosen = EarlyExitProposerSettings(**{"exit_layer": EXIT} | settings)
    return make(chosen, Surroundings(target, listener=listener))


@pytest.fixture(scope="module")
def target() -> Target:
    return wrapped(random_llama(num_layers=BLOCKS).double())


@pytest.fixture(scope="module")
def idle_target() -> Target:
    return wrapped(idle_from(random_llama(num_layers=BLOCKS).double(), EXIT))


def test_greedy_output_is_the_targets_own_in_a_batch_and_alone(target):
    wanted = [greedy(target, prompt, 12) for prompt in PROMPTS]
    for prompts in (PROMPTS, PROMPTS[:1]):
        policy = Confidence(ConfidenceSettings(threshold=0.02, max_tokens=4))
        found = decode(target, exiting(target), prompts=prompts, new=12, policy=policy, stop_tokens=())
        assert [one.tokens for one in found] == wanted[: len(prompts)]
        rounds = [one for text in found for one in text.rounds]
        assert any(one.num_accepted for one in rounds)
        assert any(one.num_accepted < one.num_draft_tokens for one in rounds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_exit_after_which_blocks_do_nothing_is_always_accepted(target, idle_target, temperature):
    """Control: where they do something, some draft tokens are rejected."""

    def accepted(one: Target) -> list[bool]:
        found = decode(one, exiting(one), prompts=PROMPTS[:1], temperature=temperature, new=16, stop_tokens=())
        return [part.num_accepted == part.num_draft_tokens for text in found for part in text.rounds]

    assert all(accepted(idle_target))
    assert not all(accepted(target))


@pytest.mark.parametrize("spoiled", [False, True])
def test_sampled_output_has_the_targets_distribution(spoiled):
    """Control: rows of q that belong to other tokens."""
    target = wrapped(random_llama(num_layers=3, vocab_size=8, hidden_size=16).double())
    proposer = exiting(target, exit_layer=1)
    if spoiled:
        propose = proposer.propose
        proposer.propose = lambda *arguments: [
            one if one.q_rows_RV is None else replace(one, q_rows_RV=one.q_rows_RV.roll(1, dims=-1))
            for one in propose(*arguments)
        ]
    assert (chi_square(target.model, proposer, 1.0, samples=500, target=target) < 1e-3) == spoiled


def test_drafting_writes_the_cache_of_the_first_blocks_and_the_targets_call_does_not_touch_it(target):
    """Bit for bit. Control: the target's call writes the columns of the blocks after them."""
    proposer = exiting(target)
    events: list[str] = []
    kept: dict[str, list[torch.Tensor]] = {}

    def columns() -> list[torch.Tensor]:
        return [part.clone() for layer in proposer._blocks.cache.hf.layers for part in (layer.keys, layer.values)]

    def watch(context: Any, one: Any) -> None:
        before, after, length = kept["drafted"], columns(), len(context.tokens) - 1
        for number, (ours, theirs) in enumerate(zip(before, after, strict=True)):
            if number < 2 * EXIT:
                assert torch.equal(ours[:, :, :length], theirs)
            else:
                assert ours.shape[2] == length - one.num_emitted, "these blocks have not read the round before the call"
        events.append(one.reason)

    propose = proposer.propose

    def noted(*arguments: Any) -> Any:
        found = propose(*arguments)
        kept["drafted"] = columns()
        return found

    proposer.propose = noted
    options: dict[str, Any] = {"rule": Lossless(), "policy": FixedLength(), "sampling": Sampling(1.0)}
    Engine(target, proposer, max_new_tokens=24, stop_tokens=(), **options).generate(PROMPTS[:1], on_round=watch)
    assert {"reject"} <= set(events)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_round_takes_d_times_l_plus_all_blocks(target, count):
    """The denominator of tokens per layer, from the ledger. Control: that of another exit."""
    ledger = Ledger()
    policy = FixedLength(FixedLengthSettings(max(count, 1)))
    if count == 0:
        policy = Confidence(ConfidenceSettings(threshold=1.0, min_tokens=0, max_tokens=4))
    proposer = exiting(target, ledger.append)
    options: dict[str, Any] = {"prompts": PROMPTS[:1], "policy": policy, "new": 20, "stop_tokens": ()}
    (found,) = decode(target, proposer, listener=ledger.append, **options)
    for one, events in zip(found.rounds, ledger.by_round(), strict=True):
        passes = sum(event.shape.num_layers for event in events)
        assert passes == one.num_draft_tokens * EXIT + BLOCKS
        assert (passes == one.num_draft_tokens * (EXIT + 1) + BLOCKS) == (one.num_draft_tokens == 0)
    assert any(one.num_draft_tokens == count for one in found.rounds)


def test_a_split_moves_between_rounds_without_a_copy(target):
    """All logits are those of whole calls. Control: a split whose caches do not move with it."""
    prompts, nodes = [[5, 6, 7, 8, 9], [3, 4, 5]], [[20, 21], [23, 24]]
    parts, whole = CachedLM(target.model, name="target"), CachedLM(target.model, name="target")
    for layer in (3, 1):
        parts.split_at(layer)
    for lm in (parts, whole):
        lm.begin(prompts)
    for split, accepted in ((1, [[0], [0, 1]]), (3, [[0, 1], [0]]), (2, [[0], [0]])):
        parts.move_split(split)
        states = parts.run_first_blocks(nodes, passed=range(1, split))
        plain = whole.forward(nodes, needs=TargetNeeds(logits=True, hidden=tuple(range(1, split + 1))))
        for ours, own, theirs in zip(parts.forward(nodes, resume=states), states, plain, strict=True):
            torch.testing.assert_close(ours.logits_BTV, theirs.logits_BTV, rtol=0, atol=1e-12)
            for layer, passed_ND in own.passed_ND.items():
                torch.testing.assert_close(passed_ND, theirs.hidden_BTD[layer][0], rtol=0, atol=1e-12)
            assert set(own.passed_ND) == set(range(1, split))
        for lm in (parts, whole):
            lm.keep(accepted)
    assert [differs(target, moves) for moves in (True, False)] == [False, True]


def differs(target: Target, moves: bool) -> bool:
    """Return whether a call from a split elsewhere gives other logits than a whole call, or none."""
    parts, whole = CachedLM(target.model, name="target"), CachedLM(target.model, name="target")
    for layer in (3, 1):
        parts.split_at(layer)
    for lm in (parts, whole):
        lm.begin([[5, 6, 7, 8, 9]])
    if moves:
        parts.move_split(3)
    parts.split = 3
    (plain,) = whole.forward([[20, 21]])
    try:
        (ours,) = parts.forward([[20, 21]], resume=parts.run_first_blocks([[20, 21]]))
    except RuntimeError:
        return True
    assert ours.logits_BTV is not None
    assert plain.logits_BTV is not None
    return not torch.allclose(ours.logits_BTV, plain.logits_BTV, rtol=0, atol=1e-9)


def test_trees_and_places_that_cannot_work_are_refused(target):
    proposer = exiting(target)
    proposer.begin([Context("a", [1], 1)], [])
    with pytest.raises(CheckpointError, match="early_exit drafts chains only"):
        proposer.propose([Budget(8, 4, width=2)], Sampling(), [torch.Generator()], lambda step: True)
    with pytest.raises(CheckpointError, match=r"split at 1\.\.3 \(4 layers\), got 4"):
        decode(target, exiting(target, exit_layer=4))
    for beside, problem in (
        ("{kind: early_exit}", "early_exit drafts chains only, and tree 24"),
        ("{kind: rasd, drafter: {kind: del}}", "drafter: del drafts with the verifying target's own blocks"),
        ("{kind: rasd, retrieval: {kind: early_exit}}", "early_exit keeps a cache"),
    ):
        with pytest.raises(RecipeError, match=problem):
            load_recipe("demo", ["eval.length={kind: tree}", f"eval.beside=[{beside}]"])
