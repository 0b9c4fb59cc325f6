"""Intervals contain the truth in 95 % of evaluations, p-values are below 0.05 in 5 %, few prompts are marked."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from drafttrain.core.generations import Generation
from drafttrain.eval.figures import compare
from drafttrain.eval.gate import shortfalls
from drafttrain.eval.interval import Interval, number, p_value
from drafttrain.eval.metrics import PromptCounts
from drafttrain.eval.quality import agreement, task_score
from drafttrain.eval.result import PairedComparison
from drafttrain.eval.statistics import (
    ratio_difference,
    ratio_interval,
    ratio_of_ratios,
    share_difference,
    share_interval,
)
from drafttrain.online.drift import drift
from drafttrain.serving.promise import promise_of
from tests.eval import results
from tests.eval.simulated import EQUALS, FIGURES, SHARES, block_efficiency
from tests.marks import slow

EVALUATIONS = 1200
"""Known to 0.6 percentage points; the benchmark runs more."""
PROMPTS = (8, slow(12), slow(32), 80)


@functools.cache
def truth_of(name):
    return {**FIGURES, **EQUALS, **SHARES}[name].truth(np.random.default_rng(99), num_prompts=100_000)


def covered(name, num_prompts):
    truth, figure = truth_of(name), {**FIGURES, **EQUALS, **SHARES}[name]
    found = figure.evaluations(np.random.default_rng([1, num_prompts]), count=EVALUATIONS, num_prompts=num_prompts)
    return np.mean([one.low <= truth <= one.high for one in found]), found


@pytest.mark.long
@pytest.mark.parametrize("num_prompts", PROMPTS)
@pytest.mark.parametrize("name", FIGURES)
def test_an_interval_contains_the_truth_in_95_percent_of_the_evaluations(name, num_prompts):
    share, _ = covered(name, num_prompts)
    assert 0.93 <= share <= 0.97


@pytest.mark.long
@pytest.mark.parametrize("num_prompts", [8, *map(slow, (12, 32, 80))])
@pytest.mark.parametrize("name", EQUALS)
def test_two_equal_drafters_differ_in_5_percent_of_the_evaluations(name, num_prompts):
    share, found = covered(name, num_prompts)
    assert 0.93 <= share <= 0.97
    equal = 1.0 if "quotient" in name else 0.0
    significant = [one.p_value < 0.05 for one in found]
    assert 0.03 <= np.mean(significant) <= 0.07
    assert significant == [not one.low <= equal <= one.high for one in found], "p-value and interval must agree"


@pytest.mark.parametrize("num_prompts", PROMPTS)
@pytest.mark.parametrize("name", SHARES)
def test_the_interval_of_a_share_contains_the_truth_in_at_least_93_percent(name, num_prompts):
    """A share has few possible values, so its coverage cannot be exactly 95 %."""
    share, _ = covered(name, num_prompts)
    assert share >= 0.93


def test_control_bootstrap_percentiles_cover_too_little():
    truth, generator = truth_of("block efficiency"), np.random.default_rng(0)
    ((tokens_P, rounds_P),) = block_efficiency(generator, EVALUATIONS * 12)
    held = 0
    for tokens_12, rounds_12 in zip(tokens_P.reshape(-1, 12), rounds_P.reshape(-1, 12), strict=True):
        chosen = generator.integers(0, 12, (300, 12))
        low, high = np.percentile(tokens_12[chosen].sum(1) / rounds_12[chosen].sum(1), [2.5, 97.5])
        held += low <= truth <= high
    assert held / EVALUATIONS < 0.93


def test_drift_without_a_change_is_reported_in_5_percent():
    ((tokens_P, rounds_P),) = block_efficiency(np.random.default_rng(0), 200 * 20)
    requests = np.stack([tokens_P, rounds_P], axis=1).reshape(200, 20, 2)
    alarms = [drift(one[:12], one[12:], resamples=199, seed=0).p_value <= 0.05 for one in requests]
    assert 0.01 <= np.mean(alarms) <= 0.09


# ---------------------------------------------------------------- by hand


def test_an_interval_of_three_prompts_by_hand():
    """Without one of the prompts 2, 4, 6: 5, 4, 3. The error is sqrt(2/3 * 2), t with 2 degrees of freedom is 4.303."""
    found = ratio_interval([2, 4, 6], [1, 1, 1])
    assert found.value == 4
    assert found.high - found.value == pytest.approx(4.302653 * math.sqrt(4 / 3))
    assert found.value - found.low == pytest.approx(found.high - found.value)
    # For the mean of three numbers it is Student's interval.
    paired = ratio_difference(([3, 3, 6], [1, 1, 1]), ([1, 2, 3], [1, 1, 1]))
    assert (paired.value, paired.p_value) == (2.0, pytest.approx(0.07417990))


def test_a_long_text_among_short_ones_leaves_few_degrees_of_freedom():
    tokens, rounds = np.array([20.0, 25, 22, 30]), np.array([10.0, 10, 10, 10])
    even = ratio_interval(tokens, rounds)
    uneven = ratio_interval(tokens * [1, 1, 1, 50], rounds * [1, 1, 1, 50])
    assert uneven.high - uneven.low > even.high - even.low


def test_without_spread_an_interval_has_no_width_and_equal_drafters_have_p_1():
    assert (lambda one: (one.low, one.high))(ratio_interval([6.0] * 9, [1.0] * 9)) == (6, 6)
    part = ([11.0, 7, 5, 13], [7.0, 3, 2, 9])
    assert ratio_difference(part, part).p_value == ratio_of_ratios(part, part).p_value == 1
    assert ratio_difference(([2.0] * 4, [1.0] * 4), ([1.0] * 4, [1.0] * 4)).p_value == 0


def test_a_prompt_without_rounds_does_not_count():
    with_it = ratio_interval([20, 25, 0, 22], [10, 10, 0, 10])
    assert with_it == ratio_interval([20, 25, 22], [10, 10, 10])
    assert ratio_interval([20, 0], [10, 0]).num_prompts == 1


def test_twelve_of_twelve_solved_is_not_a_certain_share_of_1():
    """Wilson: 12 of 12 gives 0.757 to 1. Where both solve the same prompts, the difference still has a width."""
    found = share_interval([1] * 12, [1] * 12)
    assert (found.value, found.low, found.high) == (1, pytest.approx(0.75751, abs=1e-5), 1)
    same = share_difference([1] * 12, [1] * 12)
    assert (same.value, same.p_value) == (0, 1)
    assert same.low == -same.high < -0.1
    assert share_difference([1] * 12, [0] * 12).low > 0.3
    outputs = [Generation(str(i), "", [1], [2, 3, 4], [], 0, 0, 0, 0) for i in range(12)]
    found = agreement(outputs, outputs, [one.id for one in outputs])
    assert found.equal_outputs.low < 0.8
    assert found.tokens_before_difference.low < 0.8
    assert task_score([1.0] * 12, [1.0] * 12).less_the_targets.high > 0.1


# ---------------------------------------------------------------- few prompts


def test_few_prompts_are_marked_wherever_an_interval_is_printed():
    tokens, rounds = [20, 25, 22, 30, 21, 24, 26, 23], [10] * 8
    assert "not reliable" not in str(ratio_interval(tokens, rounds))
    assert str(ratio_interval(tokens[:7], rounds[:7])).endswith("] (not reliable, n = 7)")
    assert str(ratio_interval([20], [10])) == "2.000 (no interval, n = 1)"
    one = compare([PromptCounts("a", "", 20, 10, 50, 10, (), ())], [PromptCounts("a", "", 22, 10, 50, 12, (), ())])
    assert one.block_efficiency.text(1) == "-0.2 (no interval, n = 1)"
    assert p_value(one.p_value) == p_value(None) == "p n/a"
    # An eval.json of an earlier version does not store the number of prompts.
    assert Interval(2.0, 1.0, 3.0).text() == "2.00 [1.00, 3.00]"


def test_the_gate_marks_a_lower_bound_of_few_prompts():
    def reported(prompts: int) -> list[str]:
        parts = [([24.0, 20, 30, 25, 27, 22, 23, 26][:prompts], [10.0] * prompts), ([22.0] * prompts, [10.0] * prompts)]
        found = ratio_difference(*parts)
        gain = PairedComparison(found.interval(), found.p_value)
        evaluated = results.result({"d": results.figures()}, comparisons={"d - start": gain})
        return shortfalls(evaluated, {"gain_over_start": 2.0}, drafter="d")

    assert reported(8)[0].startswith("gain_over_start: ")
    assert "not reliable" not in reported(8)[0]
    assert reported(4)[0].endswith("(not reliable, n = 4)")
    assert reported(1) == ["gain_over_start: not measured (no interval, n = 1)"]


def test_a_promise_of_one_prompt_has_no_interval():
    figures = results.figures(
        length={"kind": "fixed", "num_draft_tokens": 1}, block_efficiency=ratio_interval([20], [10])
    )
    promise = promise_of(results.result({"d": figures}), temperature=0, num_draft_tokens=1)
    assert promise is not None
    assert promise.block_efficiency.text(1) == "2.0 (no interval, n = 1)"
    assert [promise.verdict(x, x) for x in (1.9, 2.0, 2.1)] == ["below", "kept", "above"]


def test_a_rounded_zero_has_no_sign():
    assert number(-0.0004) == "0.00"
    assert number(-0.006) == "-0.01"
    assert number(-0.0004, 4) == "-0.0004"
