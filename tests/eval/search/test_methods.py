"""Searches on small known trees: fewest expansions with a perfect reward, breadth-first with a constant one, the same budget."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from drafttrain.core.errors import DataError
from drafttrain.core.texts import Prompt
from drafttrain.eval.search.methods import Question, a_star, best_of_n, particle_filter
from drafttrain.eval.search.rewards import Reward

WIDTH = 3
STEP_TOKENS = 5


@dataclass(frozen=True)
class Place:
    """A place in a tree, as the numbers of the branches that lead there."""

    path: tuple[int, ...]
    depth_of: Any

    @property
    def text(self) -> str:
        return "".join(map(str, self.path))

    @property
    def ended(self) -> bool:
        return self.path in self.depth_of


class Tree:
    """The branches of a place are drawn in turn, each at the cost of a step. Leaves are given."""

    def __init__(self, leaves: Sequence[tuple[int, ...]]) -> None:
        self.leaves = set(leaves)
        self.spent = 0
        self.drawn: Counter[tuple[int, ...]] = Counter()

    @property
    def expanded(self) -> list[str]:
        """The places from which steps were drawn, in order."""
        return ["".join(map(str, path)) for path in self.drawn]

    def start(self, prompt: Prompt) -> Place:
        return Place((), self.leaves)

    def next(self, partial: Place, number: int) -> Place:
        branch = self.drawn[partial.path] % WIDTH
        self.drawn[partial.path] += 1
        self.spent += STEP_TOKENS
        return Place((*partial.path, branch), self.leaves)


def random_leaves(seed: int, *, depth: int = 4) -> list[tuple[int, ...]]:
    """Return the leaves of a random tree: every inner place has all branches."""
    rng, found, inner = random.Random(seed), [], [()]
    while inner:
        path = inner.pop()
        for branch in range(WIDTH):
            child = (*path, branch)
            if len(child) == depth or (len(child) > 1 and rng.random() < 0.4):
                found.append(child)
            else:
                inner.append(child)
    return found


def ask(tree: Tree, reward: Reward, budget: int = 10**9) -> Question:
    return Question(Prompt("a", [1]), "", tree, reward, budget)


def fewest_expansions(leaves: Sequence[tuple[int, ...]], right: tuple[int, ...]) -> int:
    """Return the size of the smallest set of inner places, each reached by expanded ones, after which the right leaf is known."""
    inner = sorted({leaf[:length] for leaf in leaves for length in range(len(leaf))}, key=len)
    for size in range(1, len(inner) + 1):
        for chosen in itertools.combinations(inner, size):
            reached = all(not place or place[:-1] in chosen for place in chosen)
            if reached and right[:-1] in chosen:
                return size
    raise AssertionError


@pytest.mark.parametrize("seed", range(6))
def test_a_perfect_reward_leads_to_the_answer_in_the_fewest_expansions(seed):
    leaves = random_leaves(seed, depth=3)
    for right in random.Random(seed).sample(leaves, 3):
        answer = "".join(map(str, right))
        tree = Tree(leaves)
        question = ask(tree, lambda prompt, texts, answer=answer: [float(answer.startswith(one)) for one in texts])
        assert a_star(question, width=WIDTH).path == right
        assert question.num_expansions == fewest_expansions(leaves, right)
        opposite = ask(
            Tree(leaves), lambda prompt, texts, answer=answer: [float(not answer.startswith(one)) for one in texts]
        )
        assert a_star(opposite, width=WIDTH).path != right, "control: the opposite reward leads elsewhere"


@pytest.mark.parametrize("constant", [0.0, 0.3, 0.9])
def test_a_constant_reward_is_breadth_first(constant):
    leaves = list(itertools.product(range(WIDTH), repeat=3))
    tree = Tree(leaves)
    found = a_star(ask(tree, lambda prompt, texts: [constant] * len(texts)), width=WIDTH)
    levels = ["".join(map(str, path)) for depth in range(3) for path in itertools.product(range(WIDTH), repeat=depth)]
    assert tree.expanded == levels
    assert found.path == (0, 0, 0)


def test_certain_rewards_are_followed_down():
    tree = Tree(list(itertools.product(range(WIDTH), repeat=3)))
    a_star(ask(tree, lambda prompt, texts: [1.0] * len(texts)), width=WIDTH)
    assert len(tree.expanded) == 3, "control: at no cost the deeper one comes first"


@pytest.mark.parametrize("method", [a_star, best_of_n, particle_filter])
@pytest.mark.parametrize("budget", [1, 17, 60, 200])
def test_no_step_begins_after_the_budget_of_target_tokens_is_spent(method, budget):
    tree = Tree(list(itertools.product(range(WIDTH), repeat=5)))
    question = ask(tree, lambda prompt, texts: [0.5] * len(texts), budget)
    found = method(question)
    assert question.spent == tree.spent
    assert budget <= question.spent < budget + STEP_TOKENS
    assert found is not None
    second = ask(tree, lambda prompt, texts: [0.5] * len(texts), budget)
    method(second)
    assert second.spent < budget + STEP_TOKENS, "a search counts its own tokens only"


def test_best_of_n_and_particles_return_the_solution_of_the_highest_reward():
    leaves = [(branch,) for branch in range(WIDTH)]
    drawn = itertools.cycle([0, 2, 1])

    class OneStep(Tree):
        def next(self, partial: Place, number: int) -> Place:
            self.spent += STEP_TOKENS
            return Place((next(drawn),), self.leaves)

    def reward(prompt: str, texts: Sequence[str]) -> list[float]:
        return [{"0": 0.2, "1": 0.3, "2": 0.9}[one] for one in texts]

    for method in (best_of_n, particle_filter):
        assert method(ask(OneStep(leaves), reward, 6 * STEP_TOKENS)).text == "2"


def test_a_solution_that_has_ended_is_not_scored_again():
    # A third of the solutions ends after a step; the others need three.
    leaves = [(0,), *((branch, *rest) for branch in (1, 2) for rest in itertools.product(range(WIDTH), repeat=2))]
    tree, scored = Tree(leaves), []

    def reward(prompt: str, texts: Sequence[str]) -> list[float]:
        scored.extend(texts)
        return [0.5] * len(texts)

    question = ask(tree, reward, 40 * STEP_TOKENS)
    particle_filter(question)
    assert scored.count("0") == tree.drawn[()] // WIDTH
    assert question.num_rewards == len(scored) == sum(tree.drawn.values())


def test_particles_follow_the_odds_of_their_rewards():
    second_steps: Counter[str] = Counter()

    class Drawn(Tree):
        def next(self, partial: Place, number: int) -> Place:
            self.spent += STEP_TOKENS
            if partial.path:
                second_steps[partial.text] += 1
            return Place((*partial.path, self.spent // STEP_TOKENS % 4), self.leaves)

    tree = Drawn(list(itertools.product(range(4), repeat=2)))
    rewards = {"0": 0.8, "1": 0.5, "2": 0.5, "3": 0.2}
    question = ask(tree, lambda prompt, texts: [rewards[one[0]] for one in texts], 8 * STEP_TOKENS * 500)
    particle_filter(question)
    total = sum(second_steps.values())
    odds = {branch: reward / (1 - reward) for branch, reward in rewards.items()}
    for branch, weight in odds.items():
        # 2000 draws of a share of at most 0.64: five standard deviations are 0.054.
        assert abs(second_steps[branch] / total - weight / sum(odds.values())) < 0.055


@pytest.mark.parametrize(("rewards", "what"), [([0.5], "1 values for 3 texts"), ([0.1, 2.0, 0.3], "0 to 1, got 2")])
def test_rewards_that_are_no_probabilities_are_refused(rewards, what):
    with pytest.raises(DataError, match=what):
        a_star(ask(Tree([]), lambda prompt, texts: rewards), width=3)
