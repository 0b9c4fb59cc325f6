"""Maps from confidence to chance: isotonic is the best map that never falls, scalings find a planted temperature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drafttrain.core.calibration import brier, ece, log_likelihood
from drafttrain.core.recalibration import FITS, Isotonic, Scaled, Temperature, read_map

N = 20_000


def drawn(seed: int, *, sharper: float = 1.0, size: int = N) -> tuple[Any, Any]:
    """Return confidences and acceptances: the chance's logit is the confidence's logit divided by `sharper`."""
    random = np.random.default_rng(seed)
    chance = random.beta(1.5, 1.2, size).clip(1e-4, 1 - 1e-4)
    score = sharper * (np.log(chance) - np.log1p(-chance))
    return 1 / (1 + np.exp(-score)), random.random(size) < chance


def best_rising(values: Any, labels: Any) -> Any:
    """The least-squares fit that never falls, by its formula: max over starts of min over ends of the mean."""
    order = np.argsort(values, kind="stable")
    y, found = labels[order].astype(float), np.empty(len(values))
    for i in range(len(y)):
        found[i] = max(min(y[a : b + 1].mean() for b in range(i, len(y))) for a in range(i + 1))
    back = np.empty_like(found)
    back[order] = found
    return back


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_is_the_least_squares_fit_that_never_falls(seed: int) -> None:
    random = np.random.default_rng(seed)
    confidence, accepted = random.permutation(np.linspace(0.01, 0.99, 14)), random.random(14) < 0.5
    np.testing.assert_allclose(Isotonic.fit(confidence, accepted)(confidence), best_rising(confidence, accepted))


def test_equal_confidences_get_one_chance() -> None:
    fitted = Isotonic.fit([0.2, 0.2, 0.2, 0.7, 0.7], [1, 0, 0, 1, 1])
    assert fitted.starts == [0.2, 0.7]
    np.testing.assert_allclose(fitted.chances, [1 / 3, 1.0])
    np.testing.assert_allclose(fitted([0.0, 0.2, 0.69, 0.7, 1.0]), [1 / 3, 1 / 3, 1 / 3, 1.0, 1.0])


@pytest.mark.parametrize("num_bins", [1, 10, 37])
def test_isotonic_has_no_calibration_error_on_its_own_pairs(num_bins: int) -> None:
    confidence, accepted = drawn(0, sharper=2.0, size=500)
    fitted = Isotonic.fit(confidence, accepted)
    assert ece(fitted(confidence), accepted, num_bins=num_bins) < 1e-12
    assert ece(confidence, accepted, num_bins=10) > 0.05, "the control: as it was"
    assert brier(fitted(confidence), accepted) < brier(confidence, accepted)


@pytest.mark.parametrize("method", FITS)
def test_no_map_falls(method: str) -> None:
    grid = np.linspace(0, 1, 501)
    for sharper in (0.3, 1.0, 3.0):
        confidence, accepted = drawn(1, sharper=sharper, size=400)
        chances = FITS[method](confidence, accepted)(grid)
        assert (np.diff(chances) >= 0).all()
        assert chances.min() >= 0
        assert chances.max() <= 1
        # Also where high confidences fail: then the best map is a constant one.
        turned = FITS[method](1 - confidence, accepted)
        assert (np.diff(turned(grid)) >= 0).all()
    if method != "temperature":
        assert np.ptp(turned(grid)) < 0.2


@pytest.mark.parametrize("method", FITS)
def test_calibrated_confidences_stay_as_they_are(method: str) -> None:
    fitted = FITS[method](*drawn(2))
    confidence, accepted = drawn(3)
    # Isotonic fits about N^(1/3) free means; the scalings one or two numbers.
    bound = 0.03 if method == "isotonic" else 0.01
    assert np.abs(fitted(confidence) - confidence).mean() < bound
    assert ece(fitted(confidence), accepted) < 0.03
    # The control: confidences that are too sharp are changed by much more.
    sharp = drawn(2, sharper=3.0)[0]
    assert np.abs(FITS[method](sharp, drawn(2)[1])(sharp) - sharp).mean() > 0.1


def test_a_planted_temperature_is_found_and_helps_on_other_pairs() -> None:
    confidence, accepted = drawn(4, sharper=2.5)
    others, accepted_too = drawn(5, sharper=2.5)
    maps = {name: fit(confidence, accepted) for name, fit in FITS.items()}
    temperature, platt = maps["temperature"], maps["platt"]
    assert isinstance(temperature, Temperature)
    assert isinstance(platt, Scaled)
    assert 1 / temperature.scale == pytest.approx(2.5, rel=0.05)
    assert platt.scale == pytest.approx(1 / 2.5, rel=0.05)
    assert abs(platt.shift) < 0.05
    for each in maps.values():
        assert ece(each(others), accepted_too) < 0.2 * ece(others, accepted_too)
        assert brier(each(others), accepted_too) < brier(others, accepted_too) - 0.005


def test_scalings_have_the_greatest_likelihood() -> None:
    confidence, accepted = drawn(6, sharper=1.7, size=800)
    fitted = Temperature.fit(confidence, accepted)
    best = log_likelihood(fitted(confidence), accepted)
    for scale in (0.9 * fitted.scale, 1.1 * fitted.scale, 1.0):
        assert log_likelihood(Temperature(scale, 0.0)(confidence), accepted) < best


def test_where_chances_fall_platts_map_is_the_likeliest_constant_of_its_labels() -> None:
    accepted = np.array([1, 1, 1, 0, 1, 0, 0])
    fitted = Scaled.fit(np.linspace(0.1, 0.9, 7), accepted)
    assert fitted.scale == 0
    # By hand: 4 accepted of 7, so labels of 5/6 and 1/5.
    labels = np.where(accepted == 1, 5 / 6, 1 / 5)
    constant = float(fitted(0.5))
    assert constant == pytest.approx(labels.mean())
    assert constant != pytest.approx(accepted.mean(), abs=1e-3), "control: the plain mean"

    def likelihood(chance: float) -> float:
        return float((labels * np.log(chance) + (1 - labels) * np.log(1 - chance)).sum())

    assert likelihood(constant) > max(likelihood(constant + 0.01), likelihood(constant - 0.01))


@pytest.mark.parametrize("method", FITS)
def test_separated_and_one_sided_pairs_have_a_map(method: str) -> None:
    for accepted in ([0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]):
        chances = FITS[method]([0.1, 0.2, 0.8, 1.0], accepted)([0.0, 0.5, 1.0])
        assert np.isfinite(chances).all()
        assert (np.diff(chances) >= 0).all()
    with pytest.raises(ValueError, match="no pair"):
        FITS[method]([], [])


@pytest.mark.parametrize("method", FITS)
def test_a_map_is_read_back_and_a_damaged_one_is_refused(method: str) -> None:
    confidence, accepted = drawn(7, sharper=2.0, size=300)
    fitted = FITS[method](confidence, accepted)
    held = fitted.as_json()
    again = read_map(held)
    assert again.method == method
    np.testing.assert_array_equal(again(confidence), fitted(confidence))
    key = "chances" if method == "isotonic" else "scale"
    for wrong in (
        {},
        {"method": "mean"},
        held | {key: "x"},
        held | {key: [0.9, 0.1]},
        held | {key: -1},
        held | {key: [10**400] if method == "isotonic" else 10**400},
    ):
        with pytest.raises(ValueError, match="must be"):
            read_map(wrong)
