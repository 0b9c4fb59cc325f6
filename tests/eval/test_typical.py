"""Typical acceptance: greedy at temperature 0, monotone in epsilon and delta, labelled as lossy."""

from __future__ import annotations

import math

import pytest
import torch

from drafttrain.core.probability import sampling_probs
from drafttrain.core.proposals import Exactness, Proposal, fixed_chain, fixed_tree
from drafttrain.core.target_probs import TargetProbs
from drafttrain.core.texts import Sampling
from drafttrain.drafters.causal_lm.proposer import ChainProposer
from drafttrain.eval.acceptance.lossless import Lossless
from drafttrain.eval.acceptance.typical import Typical, TypicalSettings
from drafttrain.eval.length.tree import TreeLength, TreeSettings
from tests.eval.decoding import chi_square, noisy, small_target


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_tree(seed: int, vocabulary: int = 5) -> tuple[Proposal, torch.Tensor]:
    """Return a tree of 12 nodes with distinct siblings, and logits after each of them."""
    random = torch.Generator().manual_seed(seed)
    used: dict[int, set[int]] = {}
    nodes: list[tuple[int, int]] = []
    while len(nodes) < 12:
        parent = int(torch.randint(0, len(nodes) + 1, (), generator=random))
        token = int(torch.randint(0, vocabulary, (), generator=random))
        if token not in used.setdefault(parent, set()):
            used[parent].add(token)
            nodes.append((token, parent))
    return fixed_tree(0, nodes), 2 * torch.randn(13, vocabulary, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(8))
def test_at_temperature_zero_it_is_the_greedy_rule(seed):
    tree, logits_NV = random_tree(seed)
    probs_NV = sampling_probs(logits_NV, Sampling())
    found = Typical(TypicalSettings(epsilon=0.999, delta=50))(tree, TargetProbs.of(probs_NV), None, generator())
    assert found == Lossless()(tree, TargetProbs.of(probs_NV), None, generator())


def test_a_lower_epsilon_or_delta_never_accepts_less():
    grid = [0.9, 0.5, 0.2, 0.05, 0.001]
    grew = 0
    for seed in range(12):
        tree, logits_NV = random_tree(seed)
        probs_NV = logits_NV.softmax(-1)

        def kept(epsilon: float, delta: float, tree: Proposal = tree, probs_NV: torch.Tensor = probs_NV) -> int:
            return len(Typical(TypicalSettings(epsilon, delta))(tree, TargetProbs.of(probs_NV), None, generator())[0])

        for lengths in ([kept(e, 0.5) for e in grid], [kept(0.5, d) for d in grid]):
            assert lengths == sorted(lengths)
            grew += lengths[-1] > lengths[0]
    assert grew > 12


def test_the_threshold_by_hand_and_the_longest_path():
    settings = TypicalSettings(epsilon=0.09, delta=0.3)
    sure, flat = torch.tensor([1.0, 0, 0, 0]), torch.full((4,), 0.25)
    thresholds = Typical(settings).thresholds(torch.stack([sure, flat]))
    assert thresholds.tolist() == pytest.approx([0.09, 0.3 / 4])
    assert thresholds[1] == pytest.approx(0.3 * math.exp(-math.log(4)))
    # Both children of the root pass; only the less likely one has a child that passes.
    tree = fixed_tree(9, [(0, 0), (1, 0), (2, 1), (3, 2)])
    probs_NV = torch.tensor([[0.6, 0.4, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]).double()
    assert Typical(settings)(tree, TargetProbs.of(probs_NV), None, generator()) == ([0, 2, 4], 2)
    # Of equally long paths, the likelier.
    assert Typical(settings)(fixed_tree(9, [(1, 0), (0, 0)]), TargetProbs.of(probs_NV), None, generator())[0] == [0, 2]
    assert Typical(settings)(fixed_chain(9, [2]), TargetProbs.of(probs_NV), None, generator())[0] == [0]


def test_it_is_lossy_and_labelled_so():
    """The test that lossless trees pass must detect it."""
    assert Typical.exactness is Exactness.LOSSY
    model = small_target().model
    proposer = ChainProposer(noisy(model, 0.15), target_vocab_size=8)
    tree = TreeLength(TreeSettings(num_draft_tokens=5, depth=2, width=2))

    def use_the_rule(engine) -> None:
        engine.rule = Typical()

    assert chi_square(model, proposer, 1.0, samples=1000, policy=tree, prepare=use_the_rule) < 1e-3
