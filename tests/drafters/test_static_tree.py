"""The greedy tree is the best one. Accuracies that increase with rank are pooled first."""

from __future__ import annotations

import itertools

import pytest
import torch

from drafttrain.drafters.medusa.static_tree import Path, best_paths, non_increasing, within


def table(seed: int, heads: int, ranks: int) -> list[list[float]]:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(heads, ranks, generator=random).double().sort(dim=-1, descending=True).values.tolist()


def worth(paths: list[Path], accuracy_KR: list[list[float]]) -> float:
    """Return the expected number of accepted draft tokens: a node counts when its whole path is right."""
    total = 0.0
    for path in paths:
        product = 1.0
        for head, rank in enumerate(path):
            product *= accuracy_KR[head][rank]
        total += product
    return total


def brute_force(accuracy_KR: list[list[float]], nodes: int, *, depth: int = 9, width: int = 9) -> float:
    heads, ranks = min(len(accuracy_KR), depth), min(len(accuracy_KR[0]), width)
    every = [p for length in range(1, heads + 1) for p in itertools.product(range(ranks), repeat=length)]
    return max(
        worth(list(chosen), accuracy_KR)
        for chosen in itertools.combinations(every, nodes)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_tree_is_the_best_of_its_size(seed):
    accuracy_KR = table(seed, heads=2, ranks=3)
    for nodes in (1, 2, 4, 6):
        assert worth(best_paths(accuracy_KR, nodes), accuracy_KR) == pytest.approx(brute_force(accuracy_KR, nodes))


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_within_a_limit_is_the_best_within_the_limit(seed):
    accuracy_KR = table(seed, heads=3, ranks=3)
    paths = best_paths(accuracy_KR, 99)
    assert len(paths) == 3 + 9 + 27
    for depth, width in ((1, 3), (2, 2), (3, 2)):
        found = within(paths, nodes=3, depth=depth, width=width)
        assert worth(found, accuracy_KR) == pytest.approx(brute_force(accuracy_KR, 3, depth=depth, width=width))


def test_a_parent_comes_before_its_children_and_no_node_twice():
    paths = best_paths(table(0, heads=4, ranks=10), 256)
    assert len(set(paths)) == 256
    assert all(len(path) == 1 or paths.index(path[:-1]) < place for place, path in enumerate(paths))


def test_guesses_that_are_never_right_get_no_node():
    assert best_paths([[0.5, 0.0], [0.0, 0.0]], 10) == [(0,)]


def test_pooling_is_the_nearest_table_that_does_not_increase():
    assert non_increasing([0.5, 0.3, 0.1]) == [0.5, 0.3, 0.1]
    assert non_increasing([0.5, 0.1, 0.3, 0.05]) == pytest.approx([0.5, 0.2, 0.2, 0.05])
    assert non_increasing([0.1, 0.2, 0.6]) == pytest.approx([0.3, 0.3, 0.3])
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        raw = torch.rand(6, generator=random).tolist()
        pooled = non_increasing(raw)
        assert pooled == sorted(pooled, reverse=True)
        assert sum(pooled) == pytest.approx(sum(raw))


def test_control_without_pooling_the_tree_is_not_the_best():
    with pytest.raises(AssertionError):
        best_paths([[0.1, 0.8], [0.5, 0.4]], 3)
