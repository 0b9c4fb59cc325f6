"""The batch schedule: the best lengths by brute force, no look at later tokens, and the output distribution with and without one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, product
from operator import mul
from typing import Any

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.eval.length.batch_schedule import BatchSchedule, BatchScheduleSettings, scheduled
from tests.drafters.block_models import block_drafter
from tests.eval.test_dspark_engine import (
    DSPARK,
    NEW,
    PROMPTS,
    decoded,
    distribution_of,
    small,
    target,
    trained_briefly,
    written,
)

__all__ = ["small", "target"]


def yield_of(lengths: Sequence[int], survivals: Sequence[Sequence[float]], cost: Any) -> float:
    """Return the expected tokens per time of these lengths."""
    expected = len(lengths) + sum(sum(one[:length]) for one, length in zip(survivals, lengths, strict=True))
    return expected / cost(len(lengths) + sum(lengths))


def best(survivals: Sequence[Sequence[float]], cost: Any, *, most: int | None) -> list[int]:
    """Return the lengths of the highest expected tokens per time, of all there are."""
    every = product(*(range(len(one) + 1) for one in survivals))
    fit = [one for one in every if most is None or len(one) + sum(one) <= max(most, len(one))]
    return list(max(fit, key=lambda one: yield_of(one, survivals, cost)))


def whole_curve(survivals: Sequence[Sequence[float]], cost: Any) -> list[int]:
    """The forbidden rule: add draft tokens in the same order, and take the best point of the whole curve."""
    lengths, points = [0] * len(survivals), [[0] * len(survivals)]
    for _, depth, number in sorted((-c, d, n) for n, one in enumerate(survivals) for d, c in enumerate(one, 1)):
        lengths[number] = depth
        points.append(list(lengths))
    return max(points, key=lambda one: yield_of(one, survivals, cost))


def cases(count: int) -> Any:
    """Yield the chances of up to three drafts of up to three tokens, and a generator."""
    draw = random.Random(0)
    for _ in range(count):
        yield [[draw.random() for _ in range(draw.randint(0, 3))] for _ in range(draw.randint(1, 3))], draw


def surviving(chances: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(accumulate(one, mul)) for one in chances]


def in_steps(num_tokens: int) -> float:
    """A cost that rises with every second token, as of an engine that pads its batches."""
    return 1 + 0.2 * -(-num_tokens // 2)


def test_lengths_are_the_best_ones_by_brute_force():
    """At a cost that is proportional to the tokens, the first token that does not pay is the end of those that do."""
    found = []
    for chances, draw in cases(400):
        slope, most = draw.choice([0.02, 0.2, 1.0]), draw.choice([None, 3, 5])
        survivals, cost = surviving(chances), lambda num_tokens, slope=slope: 1 + slope * num_tokens
        lengths = scheduled(survivals, cost, most=most)
        assert lengths == best(survivals, cost, most=most)
        found.append(tuple(lengths))
    assert len(set(found)) > 20


def test_control_the_chance_of_each_token_alone_is_not_the_best_order():
    cost = lambda num_tokens: 1 + 0.2 * num_tokens  # noqa: E731
    differ = 0
    for chances, _ in cases(200):
        # As survivals they would have to fall along a draft.
        falling = [list(accumulate(one, min)) for one in chances]
        differ += scheduled(falling, cost) != best(surviving(chances), cost, most=None)
    assert differ > 20


def test_the_first_token_that_does_not_pay_is_the_end():
    """Of two tokens at the price of one, the first does not pay alone."""
    cost = lambda num_tokens: 1.0 if num_tokens == 1 else 1.5  # noqa: E731
    assert scheduled([[0.4, 0.39]], cost) == [0]
    assert whole_curve([[0.4, 0.39]], cost) == [2]
    assert scheduled([[0.6, 0.1]], cost) == [2]
    assert scheduled([[], [0.6]], lambda num_tokens: 1.0) == [0, 1]
    # Certain tokens have equal chances, and are taken in their order.
    assert scheduled([[1.0, 1.0], [1.0]], lambda num_tokens: 1.0, most=4) == [1, 1]


@pytest.mark.parametrize(("rule", "depends"), [(scheduled, False), (whole_curve, True)])
def test_no_token_is_judged_by_what_comes_after_it(rule, depends):
    """Whether token s of a draft is verified stays the same whatever is predicted after it."""
    changed = 0
    for chances, draw in cases(400):
        before = rule(surviving(chances), in_steps)
        number = draw.randrange(len(chances))
        for size in range(1, len(chances[number]) + 1):
            other = [list(one) for one in chances]
            other[number][size:] = [draw.random() for _ in other[number][size:]]
            changed += (rule(surviving(other), in_steps)[number] >= size) != (before[number] >= size)
    assert (changed > 0) == depends


class Noted(BatchSchedule):
    """Notes what it was asked and how much it had verified in each round."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(BatchScheduleSettings(**settings))
        self.rounds: list[tuple[list[int], list[int]]] = []

    def lengths(self, survivals: Sequence[Sequence[float]]) -> list[int]:
        found = super().lengths(survivals)
        self.rounds.append(([len(one) for one in survivals], found))
        return found


def test_a_batch_writes_the_targets_own_text_within_its_tokens(target):
    drafter, policy = trained_briefly(target, "vanilla"), Noted(batch_tokens=6)
    together = decoded(target, drafter, policy)
    assert [one.tokens for one in together] == [list(text) for text in written(target)]
    assert all(len(drafted) + sum(verified) <= 6 for drafted, verified in policy.rounds)
    assert any(sum(verified) < sum(drafted) for drafted, verified in policy.rounds)
    assert len({tuple(verified) for _, verified in policy.rounds}) > 2
    # Rounds count what was verified.
    assert sum(one.num_draft_tokens for g in together for one in g.rounds) == sum(sum(v) for _, v in policy.rounds)


def test_without_costs_and_limits_all_is_verified(target):
    drafter, policy = trained_briefly(target, "vanilla"), Noted(token_cost=0.0)
    found = decoded(target, drafter, policy)
    assert [one.rounds for one in found] == [one.rounds for one in decoded(target, drafter)]
    assert all(drafted == verified for drafted, verified in policy.rounds)


class Alone(BatchSchedule):
    """Each sequence for itself; two draft tokens have the price of one."""

    def __init__(self, rule: Any) -> None:
        super().__init__(BatchScheduleSettings(max_tokens=2))
        self.rule = rule
        self.found: set[int] = set()

    def cost(self, num_tokens: int) -> float:
        return 1.0 if num_tokens == 1 else 1.6

    def lengths(self, survivals: Sequence[Sequence[float]]) -> list[int]:
        found = [self.rule([one], self.cost)[0] for one in survivals]
        self.found |= set(found)
        return found


@pytest.mark.long
@pytest.mark.parametrize(("rule", "temperature", "lossless"), [(scheduled, 1.0, True), (whole_curve, 1e6, False)])
def test_the_output_has_the_targets_distribution_unless_later_tokens_decide(rule, temperature, lossless, small):
    """Each token is predicted from the one before it. In the control the chance of the first is 0.5, which does not pay alone."""
    target, made = small
    drafter, policy = made("vanilla"), Alone(rule)
    drafter.temperatures[0] = temperature
    with torch.no_grad():
        head, words_Ve = drafter.confidence_head, drafter.markov_head.markov_w1.weight
        of_word_e = head.proj.weight[0, -head.rank :]
        head.proj.weight[:, : -head.rank] = 0.0
        of_word_e *= 8 / (words_Ve @ of_word_e).std()
        # One of the words that are drafted is followed by a likely one.
        second, highest = (words_Ve @ of_word_e)[drafter.vocabulary].sort().values[-2:]
        head.proj.bias.fill_(-(second + highest) / 2)
    assert (distribution_of(target, drafter.proposer(target), policy) > 1e-3) == lossless
    assert len(policy.found) > 1


def test_a_drafter_without_predictions_is_refused(target):
    drafter = block_drafter(target, "dspark", **DSPARK, confidence_head=False)
    with pytest.raises(CheckpointError, match="needs a drafter with a confidence head"):
        decoded(target, drafter, BatchSchedule(), prompts=PROMPTS[:1], new=NEW)
