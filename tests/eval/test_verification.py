"""The walk's output distribution, by enumeration of every draw and every decision: no sampling noise."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drafttrain.core.proposals import DrawMode, NodeKind, Proposal, chain, fixed_chain
from drafttrain.core.target_probs import TargetProbs
from drafttrain.eval import verification
from drafttrain.eval.acceptance.lenience import lenient
from drafttrain.eval.verification import walk

EXACT = 1e-12


class Script:
    """Takes decisions from a list, then always the first choice; records the alternatives."""

    def __init__(self, decisions: list[int]) -> None:
        self.decisions = decisions
        self.taken: list[tuple[int, list[float]]] = []
        self.probability = 1.0

    def _choose(self, chances: list[float]) -> int:
        place = len(self.taken)
        choice = self.decisions[place] if place < len(self.decisions) else 0
        self.taken.append((choice, chances))
        self.probability *= chances[choice]
        return choice

    def accept(self, chance: float) -> bool:
        chance = min(1.0, max(0.0, chance))
        return self._choose([chance, 1 - chance]) == 0

    def draw(self, probs_V: Tensor) -> int:
        return self._choose(probs_V.tolist())


def outcomes(
    run: Callable[[Script], tuple[int, ...]], script_of: Callable[[list[int]], Script] = Script
) -> dict[tuple[int, ...], float]:
    """Return the distribution of what `run` returns, over all decisions."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    decisions: list[int] = []
    while True:
        script = script_of(decisions)
        outcome = run(script)
        found[outcome] += script.probability
        decisions = [choice for choice, _ in script.taken]
        while decisions and decisions[-1] + 1 >= len(script.taken[len(decisions) - 1][1]):
            decisions.pop()
        if not decisions:
            return found
        decisions[-1] += 1


def random_distributions(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random distributions over the last axis: spread out, or with zeros."""
    x = torch.rand(shape, generator=generator, dtype=torch.float64) + 1e-3
    if kind == "zeros":
        x = x * (torch.rand(shape, generator=generator) > 0.4)
        x[..., 0] += 1e-6
    return x / x.sum(-1, keepdim=True)


def emitted_distribution(
    p: list[Tensor], q: list[Tensor], *, depth: int, propose: Callable[..., Proposal] | None = None, **options: object
) -> dict[tuple[int, ...], float]:
    """Return the distribution of the first two tokens of a chain of `depth` drafted from q and verified against p.

    p[0]: distribution of the first token; p[1][a]: of the second after a; p[2][a, b]: of the third. q likewise.
    """
    vocabulary = len(p[0])

    def run(script: Script) -> tuple[int, ...]:
        drafted: list[int] = []
        rows = []
        for level in range(depth):
            rows.append(q[level][tuple(drafted)])
            drafted.append(script.draw(rows[-1]))
        make = propose or (lambda d, r: chain([0, *d], kind=NodeKind.SAMPLED, q_rows_RV=torch.stack(r)))
        target = TargetProbs.of(torch.stack([p[level][tuple(drafted[:level])] for level in range(depth + 1)]))
        path, token = walk(make(drafted, rows), target, script, **options)  # type: ignore[arg-type]
        tokens = [*drafted[: len(path) - 1], token]
        while len(tokens) < 2:
            tokens.append(script.draw(p[len(tokens)][tuple(tokens)]))
        return tuple(tokens[:2])

    found = outcomes(run)
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    assert len(found) <= vocabulary**2
    return found


def distance(found: dict[tuple[int, ...], float], p: list[Tensor]) -> float:
    """Return the total variation distance from the target's distribution of two tokens."""
    vocabulary = len(p[0])
    pairs = itertools.product(range(vocabulary), repeat=2)
    return 0.5 * sum(abs(found.get((a, b), 0.0) - float(p[0][a] * p[1][a, b])) for a, b in pairs)


def case(vocabulary: int, depth: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    kind = ("spread", "zeros")[seed % 2]
    shapes = [(vocabulary,) * (level + 1) for level in range(max(2, depth + 1))]
    p = [random_distributions(kind, shape, generator) for shape in shapes]
    q = p if seed % 5 == 4 else [random_distributions(kind, shape, generator) for shape in shapes]
    return p, q


@pytest.mark.parametrize(("vocabulary", "depth"), [(6, 1), (4, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_a_sampled_chain_has_the_targets_distribution(vocabulary, depth, seed):
    p, q = case(vocabulary, depth, seed)
    assert distance(emitted_distribution(p, q, depth=depth), p) < EXACT


def test_disjoint_supports_have_the_targets_distribution():
    p = [torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0.5, 0.5, 0, 0]).double().expand(4, 4)]
    q = [p[0].flip(0), p[1].flip(1)]
    assert distance(emitted_distribution(p, q, depth=1), p) < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_a_fixed_chain_has_the_targets_distribution(seed):
    p, q = case(4, 2, seed)
    fixed = [int(q[0].argmax()), int(q[1][q[0].argmax()].argmax())]
    target = [p[0], p[1][fixed[0]], p[2][fixed[0], fixed[1]]]

    def run(script: Script) -> tuple[int, ...]:
        path, token = walk(fixed_chain(0, fixed), TargetProbs.of(torch.stack(target)), script)
        tokens = [*fixed[: len(path) - 1], token]
        while len(tokens) < 2:
            tokens.append(script.draw(p[len(tokens)][tuple(tokens)]))
        return tuple(tokens[:2])

    assert distance(outcomes(run), p) < EXACT


@pytest.mark.parametrize("draw", list(DrawMode))
@pytest.mark.parametrize("mixed", [False, True])
def test_siblings_have_the_targets_distribution(draw, mixed):
    """Three children of the root, drawn with or without replacement; the first one FIXED when mixed."""
    generator = torch.Generator().manual_seed(7)
    for kind in ("spread", "zeros"):
        p = random_distributions(kind, (4,), generator)
        q = random_distributions("spread", (4,), generator)

        def run(script: Script, p: Tensor = p, q: Tensor = q) -> tuple[int, ...]:
            left, tokens = q, [2] if mixed else []
            while len(tokens) < 3:
                tokens.append(script.draw(left))
                if draw is DrawMode.WITHOUT_REPLACEMENT:
                    left = left.clone()
                    left[tokens[-1]] = 0
                    left = left / left.sum()
            fixed, sampled = NodeKind.FIXED.value, NodeKind.SAMPLED.value
            proposal = Proposal(
                tokens_N=torch.tensor([0, *tokens]),
                parents_N=torch.tensor([-1, 0, 0, 0]),
                depths_N=torch.tensor([0, 1, 1, 1]),
                kinds_N=torch.tensor([0, fixed if mixed else sampled, sampled, sampled]),
                q_rows_RV=q[None],
                q_row_N=torch.tensor([0, -1, -1, -1]),
                draw=draw,
            )
            path, token = walk(proposal, TargetProbs.of(p.expand(4, 4)), script)
            return (tokens[path[1] - 1] if len(path) > 1 else token,)

        found = outcomes(run)
        assert 0.5 * sum(abs(found.get((x,), 0.0) - float(p[x])) for x in range(4)) < EXACT


# ---------------------------------------------------------------- controls: each of these errors must be detected


def worst(**change: object) -> float:
    return max(
        distance(emitted_distribution(*case(4, 2, seed), depth=2, **change), case(4, 2, seed)[0]) for seed in range(4)
    )  # type: ignore[arg-type]


def test_control_a_greedy_draft_treated_as_sampled():
    p, q = case(4, 1, 0)
    greedy = [torch.nn.functional.one_hot(row.argmax(-1), 4).double() for row in q]
    soft = lambda d, r: chain([0, *d], kind=NodeKind.SAMPLED, q_rows_RV=q[0][None])  # noqa: E731
    assert distance(emitted_distribution(p, greedy, depth=1, propose=soft), p) > 0.05
    assert distance(emitted_distribution(p, greedy, depth=1), p) < EXACT


def test_control_a_missing_residual(monkeypatch):
    monkeypatch.setattr(verification, "residual", lambda target_V, drafter_V: target_V)
    assert worst() > 0.05


def test_control_a_wrong_q():
    wrong = lambda d, r: chain([0, *d], kind=NodeKind.SAMPLED, q_rows_RV=torch.stack(r).roll(1, -1))  # noqa: E731
    assert worst(propose=wrong) > 0.05


def test_lenience_is_lossy_and_one_is_lossless():
    assert worst(credit=lenient("linear", 0.5)) > 0.01
    for form in ("linear", "square", "exponent"):
        assert worst(credit=lenient(form, 1.0)) < EXACT


def test_a_smaller_epsilon_accepts_more():
    p, q = case(4, 1, 0)

    def accepted(epsilon: float) -> float:
        found = outcomes(
            lambda s: (
                len(walk(chain([0, d := s.draw(q[0])], kind=NodeKind.SAMPLED, q_rows_RV=q[0][None]),
                         TargetProbs.of(torch.stack([p[0], p[1][d]])), s, credit=lenient("linear", epsilon))[0]) - 1,
            )
        )  # fmt: skip
        return found[(1,)]

    shares = [accepted(epsilon) for epsilon in (1.0, 0.7, 0.4, 0.1)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(float(torch.minimum(p[0], q[0]).sum()), abs=1e-9)
