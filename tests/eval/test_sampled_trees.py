"""Sampled trees: their output is the target's, by enumeration and in the loop; their shapes are those of their papers.

V = vocabulary
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy import stats

from drafttrain.core.generations import ForwardEvent, ForwardShape, Work
from drafttrain.core.probability import draw_at
from drafttrain.core.proposals import Budget, Context, DrawMode
from drafttrain.core.tree_growth import Child, TreeGrowth, Uniform
from drafttrain.eval.length import WholeBudget
from drafttrain.eval.length.best_tree import BestTrees, RankCounts
from drafttrain.eval.length.dyspec import DySpec, DySpecSettings, HeapTree, ThresholdTree
from drafttrain.eval.length.rsd_c import RsdC, RsdCSettings
from drafttrain.eval.length.rsd_s import RsdS, RsdSSettings, StochasticBeam
from drafttrain.eval.length.sequoia import RoundCost, Sequoia, SequoiaSettings
from drafttrain.eval.length.specinfer import SpecInfer, SpecInferSettings
from drafttrain.eval.length.static_tree import Shape, StaticTree, count_nodes
from tests.eval.decoding import power
from tests.eval.tree_cases import Case

EXACT = 1e-12
CONTEXT = Context("", [0], 1)
POLICIES: dict[str, Any] = {
    "rsd_c": RsdC(RsdCSettings([2, 1])),
    "rsd_s": RsdS(RsdSSettings(2, depth=2)),
    "dyspec heap": DySpec(DySpecSettings(3, depth=2, width=2)),
    "dyspec threshold": DySpec(DySpecSettings(5, threshold=0.3, depth=2, width=2)),
    "specinfer": SpecInfer(SpecInferSettings([2, 1])),
    "sequoia": Sequoia(SequoiaSettings(4, width=3, acceptance=[0.5, 0.3, 0.1])),
}
"""Small enough for an enumeration of every draw."""


@dataclass(frozen=True)
class Grows(WholeBudget):
    """A form given by the class of its growth, drawn without replacement: for controls."""

    nodes: int
    make: Any
    draw: DrawMode = DrawMode.WITHOUT_REPLACEMENT

    def budget(self, context: Context) -> Budget:
        return Budget(self.nodes, 2, 2, form=self)

    def start(self, root: int, budget: Budget, uniform: Uniform | None) -> TreeGrowth:
        made: TreeGrowth = self.make(root, budget)
        return made


class DropsUnlikely(StaticTree):
    """Drops a child after it was drawn, because the drafter finds it unlikely."""

    def __init__(self, root: int, budget: Budget) -> None:
        super().__init__(root, budget, ((), ()))

    def grow(self, children: Any) -> None:
        super().grow([[one for one in own if one[1] > math.log(0.3)] for own in children])


# ---------------------------------------------------------------- exact: every draw, every decision


@pytest.mark.long
@pytest.mark.parametrize("name", list(POLICIES))
def test_every_form_has_the_targets_distribution(name):
    case = Case.random(3, levels=3, seed=0)
    assert case.error(POLICIES[name].budget(CONTEXT)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize(("vocabulary", "seed"), [(3, 1), (3, 2), (3, 3), (2, 4), (2, 5), (4, 6)])
def test_every_form_has_the_targets_distribution_on_many_tables(name, vocabulary, seed):
    case = Case.random(vocabulary, levels=3, seed=seed)
    assert case.error(POLICIES[name].budget(CONTEXT)) < EXACT


def test_control_dropping_a_drawn_child_is_biased():
    assert Case.random(3, levels=3, seed=0).error(Grows(2, DropsUnlikely).budget(CONTEXT)) > 0.01


def test_control_a_q_that_is_not_renormalised_is_biased():
    case, budget = Case.random(4, levels=2, seed=0), RsdC(RsdCSettings([3])).budget(CONTEXT)
    assert case.error(budget) < EXACT
    assert case.error(budget, change=lambda one: replace(one, draw=DrawMode.IID)) > 1e-3


def test_control_a_heap_that_looks_at_the_token_of_a_place_is_biased():
    looks = Grows(2, lambda root, budget: HeapTree(root, budget, drawn=False))
    assert Case.random(3, levels=3, seed=0).error(looks.budget(CONTEXT)) > 1e-4


# ---------------------------------------------------------------- the draws, and the shapes of the papers


@pytest.mark.parametrize("mode", list(DrawMode))
def test_draws_have_the_distribution_of_drawing_one_after_the_other(mode):
    """Numbers on a grid so fine that every outcome has exactly its share of them."""
    probs_V = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    steps = 12
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    uniforms_NK = torch.cartesian_prod(grid, grid)
    tokens_NK, found_NK = draw_at(probs_V.expand(len(uniforms_NK), 4), uniforms_NK, mode=mode)
    pairs = Counter(map(tuple, tokens_NK.tolist()))
    for first, second in itertools.product(range(4), repeat=2):
        left = probs_V.clone()
        if mode is DrawMode.WITHOUT_REPLACEMENT:
            left[first] = 0
        chance = float(probs_V[first] * left[second] / left.sum()) if probs_V[first] else 0.0
        assert pairs[first, second] / steps**2 == pytest.approx(chance, abs=1e-12)
    assert torch.equal(found_NK, probs_V[tokens_NK])


def test_a_row_without_tokens_left_offers_none():
    probs_NV = torch.tensor([[0.0, 1.0, 0.0]])
    tokens_NK, found_NK = draw_at(probs_NV, torch.rand(1, 3, dtype=torch.float64), mode=DrawMode.WITHOUT_REPLACEMENT)
    assert tokens_NK[0, 0] == 1
    assert found_NK.tolist() == [[1.0, 0.0, 0.0]]


def test_a_stochastic_beam_draws_paths_without_replacement_from_all_paths():
    """The set of the last level's paths: p_a p_b / (1 - p_a) + p_a p_b / (1 - p_b). Power above 0.99 at a distance of 0.06."""
    generator = random.Random(0)
    q = [[0.5, 0.3, 0.2], [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]]]
    leaves = {(a, b): q[0][a] * q[1][a][b] for a in range(3) for b in range(3)}

    def drawn(probs: list[float]) -> list[Child]:
        left, order = list(enumerate(probs)), []
        while left:
            place = generator.choices(range(len(left)), [prob for _, prob in left])[0]
            order.append((left[place][0], math.log(left.pop(place)[1])))
        return order

    budget, samples = RsdS(RsdSSettings(2, depth=2)).budget(CONTEXT), 8000
    counts: Counter[frozenset[tuple[int, int]]] = Counter()
    for _ in range(samples):
        beam = StochasticBeam(9, budget, generator.random)
        while beam.frontier:
            beam.grow([drawn(q[0] if node == 0 else q[1][beam.tokens[node]]) for node in beam.frontier])
        last = [node for node, depth in enumerate(beam.depths) if depth == 2]
        counts[frozenset((beam.tokens[beam.parents[node]], beam.tokens[node]) for node in last)] += 1
    pairs = [frozenset(pair) for pair in itertools.combinations(leaves, 2)]
    wanted = [
        samples * leaves[a] * leaves[b] * (1 / (1 - leaves[a]) + 1 / (1 - leaves[b])) for a, b in map(tuple, pairs)
    ]
    assert power(samples, 0.06, len(pairs) - 1) > 0.99
    assert stats.chisquare([counts[pair] for pair in pairs], wanted).pvalue > 1e-3


def test_a_heap_without_draws_takes_the_likeliest_nodes_of_all():
    case = Case.random(3, levels=3, seed=4)
    paths = [path for level in (1, 2, 3) for path in itertools.product(range(3), repeat=level)]
    worth = {path: math.prod(float(case.q[i][path[: i + 1]]) for i in range(len(path))) for path in paths}
    tree = HeapTree(9, Budget(8, 3, 3), drawn=False)
    found: dict[int, tuple[int, ...]] = {0: ()}
    while tree.frontier:
        offered = []
        for node in tree.frontier:
            row = case.q[len(found[node])][found[node]].tolist()
            offered.append(sorted(enumerate(map(math.log, row)), key=lambda one: -one[1]))
        tree.grow(offered)
        found |= {node: (*found[tree.parents[node]], tree.tokens[node]) for node in range(1, tree.size + 1)}
    assert set(found.values()) - {()} == set(sorted(paths, key=lambda path: -worth[path])[:8])


def test_a_threshold_takes_every_place_that_is_worth_it_and_no_other():
    tree = ThresholdTree(9, Budget(20, 3, 3), drawn=True, least=math.log(0.2))
    tree.grow([[(0, math.log(0.6)), (1, math.log(0.3)), (2, math.log(0.1))]])
    assert tree.tokens == [9, 0, 1]  # places worth 1, 0.4, 0.1
    assert tree.frontier == [1, 2]
    tree.grow([[(0, math.log(0.9)), (1, math.log(0.1))], [(2, math.log(0.2)), (0, math.log(0.8))]])
    assert list(zip(tree.parents, tree.tokens, strict=True))[3:] == [(1, 0), (2, 2), (2, 0)]
    assert tree.frontier == [3, 5]  # node 4 is worth 0.06


def test_nothing_grows_below_the_second_draw_of_a_token():
    tree = SpecInfer(SpecInferSettings([3, 1])).budget(CONTEXT).form.start(9, Budget(6, 2, 3), None)  # type: ignore[union-attr]
    tree.grow([[(4, -1.0), (4, -1.0), (5, -2.0)]])
    assert tree.tokens == [9, 4, 4, 5]
    assert tree.frontier == [1, 3]


def shapes(nodes: int, levels: int, width: int) -> Iterator[Shape]:
    """Yield all shapes of up to so many nodes."""
    yield ()
    if not nodes or not levels or not width:
        return
    for size in range(1, nodes + 1):
        for first in shapes(size - 1, levels - 1, 3):
            if count_nodes(first) == size - 1:
                yield from ((first, *others) for others in shapes(nodes - size, levels, width - 1))


def accepted(shape: Shape, chances: list[float]) -> float:
    return sum(chance * (1 + accepted(child, chances)) for chance, child in zip(chances, shape, strict=False))


@pytest.mark.parametrize("chances", [[0.5, 0.2, 0.1], [0.9, 0.05, 0.02], [0.3, 0.25, 0.2], [0.4, 0.45, 0.0]])
@pytest.mark.parametrize(("nodes", "levels"), [(5, 5), (6, 2)])
def test_the_best_static_tree_is_the_best_of_all(chances, nodes, levels):
    trees = BestTrees(chances, nodes=nodes, depth=levels)
    best = max(accepted(shape, chances) for shape in shapes(nodes, levels, 3))
    shape = trees.shape(nodes=nodes, levels=levels)
    assert trees.accepted_LM[levels][nodes] == pytest.approx(best, abs=1e-12)
    assert accepted(shape, chances) == pytest.approx(best, abs=1e-12)
    assert count_nodes(shape) <= nodes


def test_a_good_drafter_gets_a_chain_and_a_chain_is_drafted_as_one():
    policy = Sequoia(SequoiaSettings(6, acceptance=[0.9, 0.05]))
    assert policy.budget(CONTEXT) == Budget(6, 6)


def test_acceptance_by_rank_counts_tests_and_acceptances():
    counts = RankCounts.of(3)
    for rejected, was_accepted in [(0, True)] * 6 + [(1, True)] * 2 + [(2, False)] * 1:
        counts.add(rejected, accepted=was_accepted)
    assert (counts.tested, counts.accepted) == ([9, 3, 0], [6, 2, 0])
    first, second = 6.5 / 10, (2 + 0.325) / 4
    assert counts.acceptance() == pytest.approx([first, (1 - first) * second, (1 - first) * (1 - second) * second / 2])


def test_the_time_of_a_round_is_linear_in_levels_and_nodes():
    @dataclass
    class Took:
        seconds: float

        def end(self) -> Took:
            return self

    def event(model: str, num_tokens: int, seconds: float) -> ForwardEvent:
        shape = ForwardShape(num_tokens, 0, 0, 2, 1, 0)
        return ForwardEvent(model, shape, Work(), Took(seconds))  # type: ignore[arg-type]

    events = [event("drafter", 2, 0.5)] * 8 + [event("target", size, 3 + 0.25 * size) for size in (4, 8, 20)]
    cost = RoundCost.of(events, levels=8)
    assert cost is not None
    assert cost.seconds(levels=3, nodes=4) == pytest.approx(3 * 1.0 + 3 + 0.25 * 10)
    assert RoundCost.of([], levels=8) is None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (RsdCSettings([]), "at least one level"),
        (SpecInferSettings([11, 10, 10]), "a tree of 1221 nodes, at most 1024"),
        (SequoiaSettings(acceptance=[0.8, 0.4]), "their sum is at most 1, got 1.2"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, problem):
    assert problem in settings.check()[0]
