"""RASD: the fused proposal has the target's distribution, by enumeration and through a model; its parts stay right.

V = vocabulary, N = nodes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.proposals import (
    Budget,
    Context,
    DrawMode,
    NodeKind,
    Proposal,
    RowsBeside,
    chain,
    fixed_tree,
)
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Prompt, Sampling
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.engine import Engine
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.proposers import Surroundings, make, rasd
from drafttrain.eval.proposers.ngram import Ngram, NgramSettings
from drafttrain.eval.proposers.rasd import Rasd, RasdSettings, fused
from drafttrain.eval.proposers.superposed import Superposed
from drafttrain.eval.proposers.token_recycling import TokenRecyclingSettings
from drafttrain.eval.verification import walk
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import chi_square, decode, greedy, noisy, small_target
from tests.eval.test_verification import EXACT, Script, case, distance, outcomes

FIXED, SAMPLED = NodeKind.FIXED.value, NodeKind.SAMPLED.value
ROOM = Budget(nodes=12, depth=3, width=4)
RETRIEVED = fixed_tree(0, [(1, 0), (2, 0), (0, 1), (3, 3), (2, 1), (1, 2)])
TREE = TreeLength(TreeSettings(num_draft_tokens=12, depth=3, width=3))


def emitted(p: list[Tensor], propose: Callable[[Script], Proposal]) -> dict[tuple[int, ...], float]:
    """Return the distribution of the first two tokens, over all draws of the proposal and of its verdict.

    p[d] is the target's distribution after each path of d tokens.
    """

    def run(script: Script) -> tuple[int, ...]:
        one = propose(script)
        tokens, paths = one.tokens_N.tolist(), list[tuple[int, ...]]()
        for node, parent in enumerate(one.parents_N.tolist()):
            paths.append(() if node == 0 else (*paths[parent], tokens[node]))
        rows = [p[len(path)][path] if len(path) < len(p) else p[0] for path in paths]
        path, token = walk(one, TargetProbs.of(torch.stack(rows)), script)
        found = [*(tokens[node] for node in path[1:]), token]
        while len(found) < 2:
            found.append(script.draw(p[len(found)][tuple(found)]))
        return tuple(found[:2])

    return outcomes(run)


def drawn_chain(q: list[Tensor], script: Script) -> Proposal:
    first = script.draw(q[0])
    second = script.draw(q[1][first])
    return chain([0, first, second], kind=NodeKind.SAMPLED, q_rows_RV=torch.stack([q[0], q[1][first]]))


def drawn_siblings(q: list[Tensor], script: Script) -> Proposal:
    """Two children of the root without replacement."""
    first = script.draw(q[0])
    left_V = q[0].clone()
    left_V[first] = 0
    second = script.draw(left_V / left_V.sum())
    return Proposal(
        torch.tensor([0, first, second]),
        torch.tensor([-1, 0, 0]),
        torch.tensor([0, 1, 1]),
        torch.tensor([0, SAMPLED, SAMPLED]),
        q_rows_RV=q[0][None],
        q_row_N=torch.tensor([0, -1, -1]),
        draw=DrawMode.WITHOUT_REPLACEMENT,
    )


@pytest.mark.long
@pytest.mark.parametrize("draw", [drawn_chain, drawn_siblings])
@pytest.mark.parametrize("seed", range(2))
def test_the_fused_proposal_has_the_targets_distribution(draw, seed):
    p, q = case(4, 2, seed)
    if draw is drawn_siblings:
        q = case(4, 2, 0)[1]  # without zeros, so that two different tokens can be drawn
    for least in (0.0, 0.25):
        may_begin = lambda token, least=least: float(q[0][token]) >= least  # noqa: E731
        found = emitted(p, lambda script: fused(draw(q, script), RETRIEVED, ROOM, may_begin=may_begin))  # noqa: B023
        assert distance(found, p) < EXACT


def test_control_a_shared_token_that_becomes_fixed():
    """A drawn token that was retrieved too is verified by its q. As FIXED it would be accepted too seldom."""
    p, q = case(4, 2, 0)

    def wrong(script: Script) -> Proposal:
        one = fused(drawn_chain(q, script), RETRIEVED, ROOM, may_begin=lambda token: True)
        kinds_N = one.kinds_N.clone()
        kinds_N[1] = FIXED if int(one.tokens_N[1]) in (1, 2) else SAMPLED
        return replace(one, kinds_N=kinds_N)

    assert distance(emitted(p, wrong), p) > 0.01


def test_control_a_drawn_token_that_gives_way_to_a_retrieved_one():
    p, q = case(4, 2, 0)

    def wrong(script: Script) -> Proposal:
        own = drawn_chain(q, script)
        if float(q[0][int(own.tokens_N[1])]) < 0.3:
            own = fixed_tree(0, [])
        return fused(own, RETRIEVED, ROOM, may_begin=lambda token: True)

    assert distance(emitted(p, wrong), p) > 0.01


def test_retrieved_nodes_come_after_the_drafters_within_the_budget():
    q_row_V = torch.full((4,), 0.25, dtype=torch.float64)
    own = chain([9, 1, 3], kind=NodeKind.SAMPLED, q_rows_RV=torch.stack([q_row_V, q_row_V]))
    one = fused(own, RETRIEVED, ROOM, may_begin=lambda token: True)
    assert one.tokens_N.tolist() == [9, 1, 3, 2, 0, 3, 2, 1]
    assert one.parents_N.tolist() == [-1, 0, 1, 0, 1, 4, 1, 3]
    assert one.depths_N.tolist() == [0, 1, 2, 1, 2, 3, 2, 2]
    assert one.kinds_N.tolist() == [0, SAMPLED, SAMPLED, *[FIXED] * 5]
    assert one.q_row_N is not None
    assert one.q_row_N.tolist() == [0, 1, *[-1] * 6]
    pruned = fused(own, RETRIEVED, ROOM, may_begin=lambda token: token != 2)
    assert pruned.tokens_N.tolist() == [9, 1, 3, 0, 3, 2], "only below the drafter's own first token"
    assert fused(own, RETRIEVED, Budget(4, 3, 4), may_begin=lambda token: True).num_draft_tokens == 4
    assert int(fused(own, RETRIEVED, Budget(9, 2, 4), may_begin=lambda token: True).depths_N.max()) == 2
    assert fused(own, RETRIEVED, Budget(9, 3, 1), may_begin=lambda token: True).tokens_N.tolist() == [9, 1, 3]


def parts(settings: RasdSettings, target: Target, drafter: Any) -> Any:
    return make(settings, Surroundings(target, drafter))


def through_a_model(temperature: float, *, samples: int) -> float:
    """Return the p-value of sampled tokens, with a sampled chain and a tree of Token Recycling."""
    target = small_target()
    drafter = CausalLMDrafter(noisy(target.model, 0.15))
    settings = RasdSettings(retrieval=TokenRecyclingSettings(), chain=True, min_probability=0.05)
    policy = TreeLength(TreeSettings(num_draft_tokens=5, depth=2, width=3))
    return chi_square(target.model, parts(settings, target, drafter), temperature, policy=policy, samples=samples)


@pytest.mark.long
@pytest.mark.parametrize(
    ("temperature", "samples"),
    [(1.0, 600), *(pytest.param(t, 4000, marks=pytest.mark.slow) for t in (0.7, 1.0))],
)
def test_output_through_a_model_has_the_targets_distribution(temperature, samples):
    assert through_a_model(temperature, samples=samples) > 1e-3


@pytest.mark.slow
def test_control_through_a_model_drawn_tokens_that_give_way_to_retrieved_ones(monkeypatch):
    def wrong(own: Proposal, retrieved: Proposal, *arguments: Any, **options: Any) -> Proposal:
        known = set(retrieved.tokens_N[1:].tolist())
        kept = own if known.intersection(own.tokens_N[1:2].tolist()) else fixed_tree(int(own.tokens_N[0]), [])
        return fused(kept, retrieved, *arguments, **options)

    monkeypatch.setattr(rasd, "fused", wrong)
    assert through_a_model(1.0, samples=4000) < 1e-3


PROMPTS = [Prompt(str(i), [1 + i % 7, 2, 3 + i % 5, 1 + i % 7, 2]) for i in range(3)]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("kind", ["causal_lm", "eagle"])
def test_greedy_output_is_the_targets_own_and_the_caches_of_the_drafter_stay_right(kind, chained):
    """A cache that loses its place would not change the text, but the drafts: they are those of a fresh drafter."""
    target = small_target()
    torch.manual_seed(0)
    if kind == "causal_lm":
        drafter: Any = CausalLMDrafter(noisy(target.model, 0.15))
    else:
        entry = drafters.entry(kind)
        drafter = entry.component.create(entry.settings(), target=target, tokenizer=target.tokenizer).double().eval()
    proposer = parts(RasdSettings(retrieval=TokenRecyclingSettings(), chain=chained, retrieved=6), target, drafter)
    compared = 0
    original = proposer._model.propose

    def watched(budgets: Sequence[Budget], *arguments: Any) -> list[Proposal]:
        nonlocal compared
        found = original(budgets, *arguments)
        for context, budget, one in zip(proposer.contexts, budgets, found, strict=True):
            fresh = drafter.proposer(target)
            needs = fresh.needs
            seen = Engine(target, fresh, rule=Lossless(), policy=TREE, sampling=Sampling(), max_new_tokens=1)._lm.begin(
                [context.tokens[:-1]], needs=needs
            )
            fresh.begin([Context(context.id, list(context.tokens), context.num_prompt_tokens)], seen)
            (wanted,) = fresh.propose([budget], Sampling(), [torch.Generator()], lambda step: True)
            assert one.tokens_N.tolist() == wanted.tokens_N.tolist()
            compared += 1
        return found

    begin, drop = proposer.begin, proposer.drop

    def begin_watched(contexts: Sequence[Context], seen: Any) -> None:
        proposer.contexts = list(contexts)
        begin(contexts, seen)

    def drop_watched(keep: Sequence[int]) -> None:
        proposer.contexts = [proposer.contexts[i] for i in keep]
        drop(keep)

    proposer._model.propose, proposer.begin, proposer.drop = watched, begin_watched, drop_watched
    found = decode(target, proposer, prompts=PROMPTS, policy=TREE, new=16, stop_tokens=())
    assert [one.tokens for one in found] == [greedy(target, prompt, 16) for prompt in PROMPTS]
    assert compared > 10
    assert any(part.num_accepted for one in found for part in one.rounds)


def test_it_composes_proposers_without_a_model():
    target = small_target()
    settings = RasdSettings(drafter=NgramSettings(), retrieval=TokenRecyclingSettings())
    both = decode(target, parts(settings, target, None), prompts=PROMPTS, policy=TREE, new=24)
    lone = decode(target, Ngram(), prompts=PROMPTS, policy=TREE, new=24)
    assert [one.tokens for one in both] == [one.tokens for one in lone]
    assert sum(len(one.rounds) for one in both) < sum(len(one.rounds) for one in lone)


def test_it_uses_the_evaluated_drafter_if_any_part_does():
    assert RasdSettings().reads_drafter
    assert not RasdSettings(drafter=NgramSettings()).reads_drafter
    assert RasdSettings(drafter=RasdSettings()).reads_drafter
    assert RasdSettings(drafter=NgramSettings(), retrieval=RasdSettings()).reads_drafter


def test_retrieved_paths_are_pruned_by_the_drafters_probability():
    target = Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")
    drafter = CausalLMDrafter(target.model)
    nodes = []
    for least in (0.0, 0.9):
        proposer = parts(RasdSettings(min_probability=least, chain=True), target, drafter)
        found = decode(target, proposer, prompts=PROMPTS[:1], policy=TREE, new=24, stop_tokens=())
        nodes.append(sum(part.num_draft_tokens for one in found for part in one.rounds) / len(found[0].rounds))
    assert nodes[1] < nodes[0]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("tiny_lexical_units", "lexical_units has look-ahead tokens beside its own nodes only"),
        ("tiny_hidden_transfer", "hidden_transfer makes its states beside its own nodes only"),
    ],
)
def test_a_drafter_with_rows_beside_its_nodes_is_refused(recipe: str, said: str):
    with pytest.raises(RecipeError, match=rf"eval\.beside: rasd adds nodes to the drafter's, and drafter\.kind {said}"):
        load_recipe(recipe, ["eval.beside=[{kind: rasd}]"])
    two, other = (chain([1, token], kind=NodeKind.FIXED) for token in (2, 3))
    beside = RowsBeside([5], [1])
    with pytest.raises(CheckpointError, match="rasd: a drafter with rows beside its own nodes"):
        fused(replace(two, beside=beside), other, Budget(4, 2, 2), may_begin=lambda _: True)


def test_a_drafter_in_the_targets_first_blocks_is_refused():
    with pytest.raises(
        RecipeError, match=r"eval\.beside: rasd adds nodes to the drafter's, and drafter\.kind kangaroo"
    ):
        load_recipe("tiny_kangaroo", ["eval.beside=[{kind: rasd}]"])
    load_recipe("tiny_kangaroo", ["eval.beside=[{kind: rasd, drafter: {kind: token_recycling}}]"])
    target = Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")
    entry = drafters.entry("kangaroo")
    drafter = entry.component.create(entry.settings(exit_layer=1), target=target, tokenizer=target.tokenizer)
    with pytest.raises(CheckpointError, match="rasd: a drafter that runs the target's first blocks"):
        parts(RasdSettings(), target, drafter)


@pytest.mark.parametrize(
    ("retrieval", "problem"),
    [
        ("{kind: rapid}", "rapid keeps a cache"),
        ("{kind: swift}", "swift keeps a cache"),
        ("{kind: rasd}", "rasd keeps a cache"),
        ("{kind: rasd, drafter: {kind: rapid}}", "rasd keeps a cache"),
        ("{kind: rasd, drafter: {kind: token_recycling}}", None),
        ("{kind: superposed}", None),
    ],
)
def test_what_finds_its_nodes_by_their_numbers_is_not_retrieval(retrieval, problem):
    overrides = [f"eval.beside=[{{kind: rasd, retrieval: {retrieval}}}]"]
    if problem is None:
        load_recipe("demo", overrides)
        return
    with pytest.raises(RecipeError, match=problem):
        load_recipe("demo", overrides)


def test_a_limit_of_either_part_is_that_of_both():
    """Superposed drafts read a cache of their own, also where they are retrieval."""

    class Windowed(Superposed):
        def why_one_at_a_time(self, longest: int) -> str | None:
            return "its window" if longest > 9 else None

    target = small_target()
    windowed = Windowed(target.model, num_tokens=8)
    for parts_of_it in ((Ngram(), windowed), (windowed, Ngram()), (windowed, windowed)):
        proposer = Rasd(*parts_of_it, RasdSettings(), widths=())
        assert proposer.why_one_at_a_time(10) == "its window"
        assert proposer.why_one_at_a_time(9) is None
    assert Rasd(Ngram(), Ngram(), RasdSettings(), widths=()).why_one_at_a_time(10) is None
