"""The permutation test is exact under the null, counts by hand, and treats prompts, not rounds, as the unit; Holm by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from drafttrain.eval.permutation import holm, permutation_p_value
from tests.eval.simulated import equal_speeds, rounds, texts, two_drafters

EVALUATIONS = 400


def p_values(draw, num_prompts, *, seed=3):
    parts = draw(np.random.default_rng(seed), EVALUATIONS * num_prompts)
    sides = [[one.reshape(EVALUATIONS, num_prompts) for one in part] for part in parts]
    found = [permutation_p_value(*((top[e], bottom[e]) for top, bottom in sides)) for e in range(EVALUATIONS)]
    return np.array(found)


def reach(share):
    """Three standard errors of a share of the evaluations."""
    return 3 * math.sqrt(share * (1 - share) / EVALUATIONS)


@pytest.mark.parametrize("num_prompts", [8, 20])
def test_p_values_of_two_equal_drafters_are_uniform(num_prompts, monkeypatch):
    """All assignments of 8 prompts, random ones of 20; seconds have no ties, and counts of rounds have some."""
    monkeypatch.setattr("drafttrain.eval.permutation.RANDOM_ASSIGNMENTS", 199)
    found, of_counts = p_values(equal_speeds, num_prompts), p_values(two_drafters(0.0), num_prompts)
    for share in (0.05, 0.25, 0.5, 0.75):
        assert abs((found <= share).mean() - share) <= reach(share) + 1 / 2**num_prompts
        assert (of_counts <= share).mean() <= share + reach(share), "ties make it cautious, never bold"
    assert found.min() >= 1 / 200, "never zero"


def test_a_better_drafter_is_found():
    assert (p_values(two_drafters(0.6), 10) <= 0.05).mean() > 0.5


def test_control_rounds_as_units_find_differences_that_are_not_there():
    """Each round is swapped by itself, although the rounds of a prompt depend on each other."""
    generator, found = np.random.default_rng(0), []
    for _ in range(200):
        acceptance_P, tokens_P = texts(generator, 8)
        shifts_2P = generator.normal(0, 0.8, (2, 8))
        logit_P = np.log(acceptance_P / (1 - acceptance_P))
        both = [rounds(generator, 1 / (1 + np.exp(-(logit_P + shift_P))), tokens_P) for shift_P in shifts_2P]
        # As many units as rounds: a prompt's tokens and rounds, divided equally.
        times = np.maximum(*both).astype(int)
        tops = np.repeat(tokens_P / times, times)
        parts = [(tops, np.repeat(one / times, times)) for one in both]
        found.append(permutation_p_value(*parts))
    assert np.mean(np.array(found) <= 0.05) > 0.2


def test_three_prompts_by_hand():
    """Differences 2, 1, 3 of equally long texts: of 8 signs only +++ and --- are as large."""
    ones = [1.0, 1, 1]
    assert permutation_p_value(([3, 3, 6], ones), ([1, 2, 3], ones)) == 2 / 8
    # 2, 1, -1: the sums of the signs are 4, 2, 2, 0, 0, 2, 2, 4; six of them are at least 2.
    assert permutation_p_value(([3, 3, 2], ones), ([1, 2, 3], ones)) == 6 / 8
    same = ([3.0, 4, 5], ones)
    assert permutation_p_value(same, same) == 1
    assert math.isnan(permutation_p_value(([3], [1]), ([2], [1])))
    # A prompt without rounds does not count.
    assert permutation_p_value(([3, 3, 6, 0], [1, 1, 1, 0]), ([1, 2, 3, 0], [1, 1, 1, 0])) == 2 / 8


def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3, 0.03 x 2, 0.5 x 1; none is below an earlier one."""
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    with_unknown = holm([0.04, math.nan, 0.01])
    assert with_unknown[::2] == pytest.approx([0.04, 0.02])
    assert math.isnan(with_unknown[1])
    assert holm([]) == []
