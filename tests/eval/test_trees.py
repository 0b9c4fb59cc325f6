"""Trees in the loop: budgets near the end, greedy identity, output distribution, labels of arms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from drafttrain.core.proposals import Budget, DraftStep, fixed_tree
from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.drafters.dynamic_tree import DynamicTree
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from drafttrain.eval.proposers.ngram import Ngram
from drafttrain.eval.settings import EvalSettings, length_label
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import PROMPTS, V, chi_square, decode, greedy, noisy, small_target
from tests.marks import slow

TREE = TreeLength(TreeSettings(num_draft_tokens=9, depth=3, width=3))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama().double(), byte_tokenizer(), name="tiny", fingerprint="")


def test_a_budget_near_the_end_loses_depth_and_only_the_nodes_that_no_longer_fit():
    budget = Budget(nodes=24, depth=5, width=4)
    assert [budget.within(left) for left in (9, 5, 3, 2, 1, 0)] == [
        budget,
        budget,
        Budget(24, 3, 4),
        Budget(20, 2, 4),
        Budget(4, 1, 4),
        Budget(0, 0, 4),
    ]
    assert Budget(5, 5).within(3) == Budget(3, 3)


def test_a_fixed_tree_knows_its_depths():
    tree = fixed_tree(7, [(1, 0), (2, 0), (3, 1), (4, 3)])
    assert tree.tokens_N.tolist() == [7, 1, 2, 3, 4]
    assert tree.parents_N.tolist() == [-1, 0, 0, 1, 3]
    assert tree.depths_N.tolist() == [0, 1, 1, 2, 3]
    assert tree.num_draft_tokens == 4


@pytest.mark.parametrize("scale", [0.0, 0.02, 5.0])
@pytest.mark.parametrize("together", [True, False])
def test_greedy_output_of_trees_is_the_targets_own(target, scale, together):
    proposer = ChainProposer(noisy(target.model, scale), target_vocab_size=V)
    groups = [PROMPTS] if together else [[prompt] for prompt in PROMPTS]
    found = [g for group in groups for g in decode(target, proposer, prompts=group, policy=TREE, new=24)]
    assert [g.tokens for g in found] == [greedy(target, prompt, 24) for prompt in PROMPTS]
    for generation in found:
        assert max(one.num_draft_tokens for one in generation.rounds) == 9
        assert all(one.start + one.max_depth + 1 <= 24 for one in generation.rounds)
    if scale == 0.0:
        assert all(one.num_accepted == one.max_depth for g in found for one in g.rounds)


def test_a_tree_accepts_more_than_the_chain_of_its_depth(target):
    drafter = noisy(target.model, 0.05)
    chain = TreeSettings(num_draft_tokens=3, depth=3, width=3)
    tree = TreeSettings(num_draft_tokens=30, depth=3, width=3)
    rounds = [
        sum(
            len(g.rounds)
            for g in decode(target, ChainProposer(drafter, target_vocab_size=V), policy=TreeLength(one), stop_tokens=())
        )
        for one in (chain, tree)
    ]
    assert rounds[1] < rounds[0]


def test_a_length_policy_written_for_chains_gets_chains_of_ngrams_under_a_tree(target):
    found = decode(target, Ngram(), policy=TREE, new=24)
    assert [g.tokens for g in found] == [greedy(target, prompt, 24) for prompt in PROMPTS]
    assert all(one.num_draft_tokens <= 3 for g in found for one in g.rounds)


def test_a_dynamic_tree_with_room_for_all_is_the_best_tree_by_brute_force():
    """With a budget so wide that nothing is pruned early, the chosen nodes are the likeliest of all paths."""
    generator = torch.Generator().manual_seed(0)
    log_probs = {(): torch.rand(3, generator=generator).softmax(-1).log()}
    for path in [(a,) for a in range(3)]:
        log_probs[path] = torch.randn(3, generator=generator).softmax(-1).log()
    tree = DynamicTree(9, Budget(nodes=7, depth=2, width=3))
    while tree.frontier:
        paths = [() if node == 0 else (tree.tokens[node],) for node in tree.frontier]
        tree.grow([sorted(enumerate(log_probs[path].tolist()), key=lambda one: -one[1]) for path in paths])
    chosen = tree.chosen()
    place = {0: 0} | {node: number for number, node in enumerate(chosen, start=1)}
    proposal = fixed_tree(9, [(tree.tokens[node], place[tree.parents[node]]) for node in chosen])
    paths = [()]
    for token, parent in zip(proposal.tokens_N.tolist()[1:], proposal.parents_N.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))

    def score(path: tuple[int, ...]) -> float:
        return sum(float(log_probs[path[:i]][path[i]]) for i in range(len(path)))

    every = [*((a,) for a in range(3)), *itertools.product(range(3), repeat=2)]
    assert set(paths[1:]) == set(sorted(every, key=score, reverse=True)[:7])


def test_a_policy_can_stop_a_tree_before_it_grows(target):
    class Stops(TreeLength):
        def more(self, step: DraftStep) -> bool:
            return step.depth < 3

    found = decode(target, ChainProposer(target.model, target_vocab_size=V), policy=Stops(TREE.settings), new=24)
    assert max(one.max_depth for g in found for one in g.rounds) == 2


SMALL_TREE = TreeLength(TreeSettings(num_draft_tokens=5, depth=2, width=2))


@pytest.mark.parametrize("temperature", [slow(0.5), 1.0])
def test_the_output_of_trees_has_the_targets_distribution(temperature):
    model = small_target().model
    proposer = ChainProposer(noisy(model, 0.15), target_vocab_size=8)
    assert chi_square(model, proposer, temperature, policy=SMALL_TREE, samples=1200) > 1e-3


@pytest.mark.long
def test_control_dropping_a_child_for_its_token_changes_the_distribution():
    """One of the children drawn from q is dropped because of its token, and the others are verified as if it never existed."""
    from drafttrain.core.probability import draw, sampling_probs
    from drafttrain.core.proposals import NodeKind, chain

    class Drops(ChainProposer):
        def propose(self, budgets: Any, sampling: Sampling, generators: Any, more: Any) -> Any:
            made = []
            seen = self._lm.forward(
                [context.tokens[length:] for context, length in zip(self._contexts, self._lm.lengths, strict=True)]
            )
            self._lm.keep([range(o.logits_BTV.shape[1]) for o in seen])  # type: ignore[union-attr]
            for context, budget, output, generator in zip(self._contexts, budgets, seen, generators, strict=True):
                assert output.logits_BTV is not None
                law_V = sampling_probs(output.logits_BTV[0, -1], sampling)
                token = draw(law_V, generator)
                kept = budget.nodes > 0 and (self.honest or float(law_V[token]) > 0.2)
                tokens = [context.tokens[-1], token] if kept else [context.tokens[-1]]
                kind = NodeKind.SAMPLED if kept else NodeKind.FIXED
                made.append(chain(tokens, kind=kind, q_rows_RV=law_V[None] if kept else None))
            return made

    model = small_target().model
    proposer = Drops(noisy(model, 0.15), target_vocab_size=8)
    proposer.honest = True  # type: ignore[attr-defined]
    assert chi_square(model, proposer, 1.0, samples=1200) > 1e-3
    proposer.honest = False  # type: ignore[attr-defined]
    assert chi_square(model, proposer, 1.0, samples=1200) < 1e-3


def test_labels_of_arms_name_the_settings_that_differ():
    assert length_label(TreeSettings()) == "tree 24"
    assert length_label(TreeSettings(num_draft_tokens=63, depth=4)) == "tree 63, depth 4"
    assert length_label(FixedLengthSettings(3)) == "fixed 3"
    assert EvalSettings(also=[TreeSettings(), TreeSettings(depth=4)]).check() == []
    problems = EvalSettings(also=[TreeSettings(), TreeSettings(), FixedLengthSettings()]).check()
    assert [problem.split(" occurs")[0] for problem in problems] == ["also: fixed 5", "also: tree 24"]
