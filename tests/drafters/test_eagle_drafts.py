"""The tree without a form (EAGLE-2's) against brute force: it has the likeliest nodes of all that a beam has scored."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from drafttrain.core.proposals import Budget, Context, DraftStep
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.tree_draft import TreeDraft, Trees
from drafttrain.eval.length.specinfer import SpecInfer, SpecInferSettings

R = 5


def distribution(path: tuple[int, ...]) -> torch.Tensor:
    """Return logits after a path of draft tokens: an arbitrary function of the path."""
    generator = torch.Generator().manual_seed(sum((token + 1) * 7**i for i, token in enumerate(path)))
    return 2 * torch.randn(R, generator=generator, dtype=torch.float64)


def begun(budget: Budget, *, first: int = 10, more: Any = lambda step: True) -> Trees:
    draft = TreeDraft(DraftVocabulary(torch.arange(first, first + R), num_tokens=100), 100)
    return draft.begin([Context("", [99], 1)], [budget], Sampling(), [torch.Generator()], more)


def grown(budget: Budget, *, more: Any = lambda step: True) -> Any:
    """Return the tree that the distributions above give; the states carry the paths, so a wrong parent would be noticed."""
    trees = begun(budget, more=more)
    read: list[tuple[int, ...]] = []
    trees.extend(distribution(())[None], torch.zeros(1, 1))
    while trees.growing:
        paths = []
        for node in trees.frontiers[0]:
            before = read[node.parent] if node.parent >= 0 else ()
            paths.append((*before, node.token - 10))
            assert len(paths[-1]) == node.depth
        read += paths
        trees.extend(torch.stack([distribution(path) for path in paths]), torch.zeros(len(paths), 1))
    return trees.proposals()[0]


def paths_of(proposal: Any) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposal.tokens_N.tolist()[1:], proposal.parents_N.tolist()[1:], strict=True):
        found.append((*found[parent], token - 10))
    assert [len(path) for path in found] == proposal.depths_N.tolist()
    return set(found[1:])


def score(path: tuple[int, ...]) -> float:
    return sum(float(distribution(path[:i]).log_softmax(0)[path[i]]) for i in range(len(path)))


@pytest.mark.parametrize(("nodes", "depth"), [(1, 3), (3, 3), (4, 4), (4, 1)])
def test_up_to_its_width_the_tree_is_the_likeliest_nodes_of_all(nodes, depth):
    every = [path for d in range(1, depth + 1) for path in itertools.product(range(R), repeat=d)]
    wanted = sorted(every, key=score, reverse=True)[:nodes]
    assert paths_of(grown(Budget(nodes, depth, width=4))) == set(wanted)


@pytest.mark.parametrize(("nodes", "depth", "width"), [(7, 3, 2), (20, 4, 3), (60, 3, 2)])
def test_a_larger_tree_is_the_likeliest_of_the_nodes_that_the_beam_scored(nodes, depth, width):
    beam: list[tuple[int, ...]] = [()]
    scored: list[tuple[int, ...]] = []
    for _ in range(depth):
        children = [
            (*path, int(token)) for path in beam for token in distribution(path).argsort(descending=True)[:width]
        ]
        scored += children
        beam = sorted(children, key=score, reverse=True)[:width]
    wanted = sorted(scored, key=score, reverse=True)[:nodes]
    proposal = grown(Budget(nodes, depth, width=width))
    assert paths_of(proposal) == set(wanted)
    assert proposal.num_draft_tokens == min(nodes, len(scored))


def test_every_node_comes_after_its_parent_even_with_equal_scores():
    proposal = grown(Budget(12, 4, width=3))
    assert all(parent < node for node, parent in enumerate(proposal.parents_N.tolist()))
    # A child that is certain is as likely as its parent: the parent is kept first.
    trees = begun(Budget(2, 3, 2))
    trees.extend(torch.tensor([[0.0, 0.0, -9.0, -9.0, -9.0]]))
    while trees.growing:
        trees.extend(torch.tensor([[200.0, 0.0, 0.0, 0.0, 0.0]]).expand(len(trees.open), -1))
    assert trees.proposals()[0].parents_N.tolist() == [-1, 0, 0]


def test_the_length_policy_is_asked_of_every_node_of_the_frontier():
    asked: list[DraftStep] = []

    def more(step: DraftStep) -> bool:
        asked.append(step)
        return step.depth < 3

    proposal = grown(Budget(20, 5, width=2), more=more)
    assert [step.depth for step in asked] == [1, 2, 2, 3, 3]
    assert int(proposal.depths_N.max()) == 2
    assert asked[0].token == 99
    for step in asked[1:3]:
        assert step.token is not None
        assert torch.equal(step.logits_V, distribution((step.token - 10,)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slots_give_every_place_of_a_shape_its_children(temperature):
    """All distributions are known before the first draw; a place deep in the tree may have more children than the root."""
    slots_SKR = torch.randn(2, 3, R, generator=torch.Generator().manual_seed(0))
    budget = SpecInfer(SpecInferSettings([1, 2, 3])).budget(Context("", [0], 1))
    draft = TreeDraft(DraftVocabulary(torch.arange(10, 10 + R), num_tokens=100), 100)
    contexts, generators = [Context("", [99], 1)] * 2, [torch.Generator().manual_seed(number) for number in range(2)]
    trees = draft.begin(contexts, [budget, budget.within(2)], Sampling(temperature), generators, lambda step: True)
    trees.extend_to_the_end(slots_SKR, slots_SKR)
    for sequence, (one, levels) in enumerate(zip(trees.proposals(), ([1, 2, 3], [1, 2]), strict=True)):
        depths = one.depths_N.tolist()
        # With replacement a token may be drawn twice: the second one has no children.
        assert [depths.count(level) for level in (1, 2)] == levels[:2]
        assert max(depths) == len(levels)
        for node, row in enumerate([] if one.q_row_N is None else one.q_row_N.tolist()):
            if row >= 0:
                wanted_R = slots_SKR[sequence, depths[node]].softmax(-1)
                assert torch.allclose(one.q_rows_RV[row, 10 : 10 + R], wanted_R)
        assert (one.q_row_N is None) == (temperature == 0)
