"""Scaling forms on planted data: coefficients, the choice between forms, refusals, plans."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from drafttrain.core.errors import DataError
from drafttrain.eval.scaling.budget import best_for
from drafttrain.eval.scaling.fit import Scaling, fit_scaling
from drafttrain.eval.scaling.forms import LogLinear, Power, Saturating

SIZES, TOKENS, SEEDS = (1e5, 3e5, 1e6, 3e6, 1e7), (1e6, 4e6, 1.6e7, 6.4e7), 2
NOISE = 0.05


def runs(planted: Callable[[float, float], float], *, seed: int = 0, noise: float = NOISE) -> tuple[dict, list[float]]:
    """Return the variables and block efficiencies of 5 sizes, 4 numbers of tokens and 2 seeds."""
    random = np.random.default_rng(seed)
    grid = [(size, tokens) for size in SIZES for tokens in TOKENS for _ in range(SEEDS)]
    values = [planted(size, tokens) + noise * random.standard_normal() for size, tokens in grid]
    return {"parameters": [size for size, _ in grid], "tokens": [tokens for _, tokens in grid]}, values


def fitted(planted: Callable[[float, float], float], *, seed: int = 0, draws: int = 20) -> Scaling:
    variables, values = runs(planted, seed=seed)
    return fit_scaling(variables, values, num_draft_tokens=7, draws=draws)


def log_linear(size: float, tokens: float) -> float:
    return -1.0 + 0.2 * math.log10(size) + 0.35 * math.log10(tokens)


def power(size: float, tokens: float) -> float:
    return 4.0 - 30.0 * size**-0.35 - 2000.0 * tokens**-0.55


def saturating(size: float, tokens: float) -> float:
    return 1 + 7 / (1 + math.exp(16.0 - 1.2 * math.log10(size) - 1.4 * math.log10(tokens)))


@pytest.mark.parametrize(
    ("planted", "name"), [(log_linear, "log-linear"), (power, "power"), (saturating, "saturating")]
)
def test_the_planted_form_is_chosen_with_its_coefficients(planted, name):
    found = fitted(planted)
    assert found.best.name == name
    points = np.array([[1e6, 1.6e7], [1e5, 1e6], [1e7, 6.4e7]])
    np.testing.assert_allclose(found(points), [planted(*point) for point in points], atol=3 * NOISE)
    # The control: a log-linear fit of the others is worse where it matters.
    straight = next(form for form in found.forms if form.name == "log-linear")
    assert (straight.aicc == found.best.aicc) == (name == "log-linear")


def test_noise_alone_is_a_constant():
    assert fitted(lambda size, tokens: 2.5).best.name == "constant"


@pytest.mark.parametrize(
    "form", [LogLinear(["x"]), Power(["x"]), Saturating(["x"], num_draft_tokens=7)], ids=lambda one: one.name
)
def test_without_noise_the_coefficients_are_exact(form):
    points = np.geomspace(1e4, 1e8, 9)[:, None]
    planted = {"log-linear": [0.5, 0.4], "power": [4.0, 60.0, 0.4], "saturating": [-5.0, 0.8]}[form.name]
    found = form.fit(points, form(np.array(planted), points))
    np.testing.assert_allclose(found, planted, rtol=2e-3)


def coverage(draws: int) -> float:
    """Return how often the interval of the slope by tokens contains the planted one."""
    inside = 0
    for seed in range(draws):
        variables, values = runs(log_linear, seed=seed)
        points = np.array(list(variables.values())).T
        form, random = LogLinear(list(variables)), np.random.default_rng(seed)
        rows = random.integers(len(values), size=(300, len(values)))
        drawn = [form.fit(points[chosen], np.array(values)[chosen])[2] for chosen in rows]
        low, high = np.quantile(drawn, [0.025, 0.975])
        inside += low <= 0.35 <= high
    return inside / draws


@pytest.mark.long
def test_intervals_contain_the_planted_slope_in_about_95_percent_of_the_studies():
    assert 0.90 <= coverage(200) <= 0.97


def test_the_interval_of_a_slope_contains_the_planted_one_and_not_zero():
    best = fitted(log_linear, draws=100).best
    name = "slope of log10 tokens"
    assert best.low[name] < 0.35 < best.high[name]
    assert best.low[name] > 0


def test_fewer_than_four_values_are_refused_and_all_problems_named():
    variables = {"parameters": [1e5, 1e5, 1e6, 1e6], "tokens": [1e6, 2e6, 3e6, 3e6]}
    with pytest.raises(DataError, match=r"parameters has 2 different values.*tokens has 3.*4 runs"):
        fit_scaling(variables, [1.0, 1.1, 1.2, 1.3], num_draft_tokens=7)


def test_a_prediction_outside_of_the_bounds_of_block_efficiency_is_refused():
    found = fitted(log_linear)
    assert found.predict({"parameters": 1e8, "tokens": 1e9}) == pytest.approx(log_linear(1e8, 1e9), abs=0.2)
    with pytest.raises(DataError, match="between 1 and 8"):
        found.predict({"parameters": 1e15, "tokens": 1e24})
    with pytest.raises(DataError, match="between 1 and 8"):
        found.predict({"parameters": 10, "tokens": 10})


def test_a_plan_is_the_best_of_all_sizes_and_stays_within_what_was_measured():
    found, budget = fitted(lambda size, tokens: log_linear(tokens, size)), 6 * 1e6 * 1e7
    costs = [(size, 5 * size / 1e8) for size in SIZES]
    plan = best_for(found, budget, costs=costs, parameters=(1e5, 1e7), tokens=(1e6, 6.4e7))
    assert 6 * plan.parameters * plan.tokens == pytest.approx(budget)
    assert 1e6 <= plan.tokens <= 6.4e7

    def mbsu(size: float) -> float:
        return found.predict({"parameters": size, "tokens": budget / (6 * size)}) / (1 + 5 * size / 1e8)

    sizes = [size for size in np.geomspace(1e5, 1e7, 1000) if 1e6 <= budget / (6 * size) <= 6.4e7]
    assert plan.mbsu == pytest.approx(max(map(mbsu, sizes)), rel=1e-3)
    # The control: dear drafters are planned smaller.
    dear = best_for(
        found, budget, costs=[(s, 500 * s / 1e8) for s in SIZES], parameters=(1e5, 1e7), tokens=(1e6, 6.4e7)
    )
    assert dear.parameters < plan.parameters
    with pytest.raises(DataError, match="Give a budget between these"):
        best_for(found, 1e6, costs=costs, parameters=(1e5, 1e7), tokens=(1e6, 6.4e7))
