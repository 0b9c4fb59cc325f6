"""The judge: its loss, its size, its threshold; separable states are separated."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from drafttrain.core.calibration import auc
from drafttrain.heads.folder import load_head
from drafttrain.heads.judge import JudgeHead, JudgeSettings, threshold_of_recall
from drafttrain.heads.rows import HeadRows
from drafttrain.heads.token_head import probabilities


def judge(hidden_size: int = 8, **settings: object) -> JudgeHead:
    torch.manual_seed(0)
    return JudgeHead(JudgeSettings(drafter="d", **settings), hidden_size)


def test_without_gamma_it_is_weighted_cross_entropy():
    scores_N, labels_N = torch.randn(50), (torch.rand(50) < 0.5).float()
    one = judge(error_weight=3.0)
    weights_N = torch.where(labels_N == 1, 1.0, 3.0)
    expected_N = weights_N * binary_cross_entropy_with_logits(scores_N, labels_N, reduction="none")
    torch.testing.assert_close(one.loss(scores_N, labels_N), expected_N)
    torch.testing.assert_close(one.weights(labels_N), weights_N)


def test_gamma_discounts_rows_that_are_sure():
    scores_N, labels_N = torch.randn(50), (torch.rand(50) < 0.5).float()
    chance_N = torch.where(labels_N == 1, scores_N.sigmoid(), 1 - scores_N.sigmoid())
    weights_N = torch.where(labels_N == 1, 1.0, 3.0)
    found_N = judge(error_weight=3.0, focal_gamma=2.0).loss(scores_N, labels_N)
    torch.testing.assert_close(found_N, -weights_N * (1 - chance_N) ** 2 * chance_N.log())
    assert not torch.allclose(found_N, judge(error_weight=3.0).loss(scores_N, labels_N))


@pytest.mark.parametrize("labels", [0.0, 1.0])
def test_the_loss_stays_finite_at_extreme_scores(labels):
    scores_N = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss_N = judge(focal_gamma=2.0).loss(scores_N, torch.full((2,), labels))
    loss_N.sum().backward()
    assert torch.isfinite(loss_N).all()
    assert torch.isfinite(scores_N.grad).all()


def test_a_linear_judge_has_one_weight_per_dimension_and_a_bias():
    assert sum(p.numel() for p in judge(4096).parameters()) == 4097
    assert sum(p.numel() for p in judge(16, width=5).parameters()) == 16 * 5 + 5 + 5 + 1


def separable(count: int) -> HeadRows:
    generator = torch.Generator().manual_seed(1)
    features_ND = torch.randn(count, 8, generator=generator)
    return HeadRows(features_ND, (features_ND[:, 0] + 0.1 * torch.randn(count, generator=generator) > 0.8).float())


def test_separable_states_are_separated_and_a_higher_threshold_accepts_fewer(tmp_path):
    one = judge(recall=0.9)
    rows, held_out = separable(600), separable(900)
    optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (one.loss(one(rows.features_ND), rows.labels_N).sum() / one.weights(rows.labels_N).sum()).backward()
        optimizer.step()
    predicted_N = probabilities(one, held_out)
    assert auc(predicted_N, held_out.labels_N) > 0.95
    assert auc(probabilities(judge(), held_out), held_out.labels_N) < 0.9  # the control: untrained
    kept = [int((predicted_N > delta).sum()) for delta in torch.linspace(0, 1, 21)]
    assert kept == sorted(kept, reverse=True)
    one.finish(held_out)
    matter_N = held_out.labels_N == 0
    assert float((predicted_N[matter_N] <= one.delta).double().mean()) >= 0.9
    one.save(tmp_path)
    assert torch.equal(load_head(tmp_path, kind="judge").head.delta, one.delta)


@pytest.mark.parametrize(("recall", "threshold"), [(0.25, 0.15), (0.5, 0.25), (0.51, 0.55), (1.0, 0.85)])
def test_the_threshold_rejects_enough_of_what_matters_and_little_else(recall, threshold):
    predicted_N = torch.tensor([0.8, 0.9, 0.1, 0.3, 0.2, 0.95])
    labels_N = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    assert threshold_of_recall(predicted_N, labels_N, recall=recall) == pytest.approx(threshold)
