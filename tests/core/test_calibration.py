"""Figures of predicted probabilities, against cases by hand and slow plain versions."""

import numpy as np
import pytest

from drafttrain.core.calibration import auc, brier, calibration, ece, log_likelihood, reliability


def test_ece_by_hand():
    predicted, labels = [0.05, 0.15, 0.15, 0.95], [0.0, 1.0, 0.0, 1.0]
    # Ranges: [0, .1) off by .05; [.1, .2) predicts .15 of .5; [.9, 1] off by .05.
    assert ece(predicted, labels) == pytest.approx((0.05 + 2 * 0.35 + 0.05) / 4)
    assert [one.count for one in reliability(predicted, labels)] == [1, 2, *[0] * 7, 1]
    assert sum(one.count for one in reliability([0.0, 1.0], [0, 1])) == 2


def test_true_probabilities_are_calibrated_and_shifted_ones_are_not():
    rng = np.random.default_rng(0)
    chances = rng.random(20_000)
    labels = rng.random(20_000) < chances
    assert ece(chances, labels) < 0.02
    assert ece(chances**2, labels) > 0.1
    assert log_likelihood(chances, labels) > log_likelihood(chances**2, labels)
    assert brier(chances, labels) < brier(chances**2, labels)


def test_auc_is_the_probability_of_the_right_order():
    rng = np.random.default_rng(1)
    predicted, labels = rng.integers(0, 6, 60) / 5, rng.integers(0, 2, 60)
    pairs = [(p > r) + 0.5 * (p == r) for p in predicted[labels == 1] for r in predicted[labels == 0]]
    assert auc(predicted, labels) == pytest.approx(np.mean(pairs))
    assert auc(predicted, 1 - labels) == pytest.approx(1 - np.mean(pairs))
    assert np.isnan(auc(predicted, np.ones(60)))
    # A soft label counts on both sides.
    soft = rng.random(60)
    twice = auc(np.r_[predicted, predicted], np.r_[np.ones(60), np.zeros(60)])
    assert twice == pytest.approx(0.5)
    assert 0 < auc(predicted, soft) < 1


def test_all_figures_of_one_set():
    found = calibration([0.2, 0.8], [0.0, 1.0])
    assert (found.count, found.auc, found.mean_label) == (2, 1.0, 0.5)
    assert [one.count for one in found.reliability] == [1, 1]
