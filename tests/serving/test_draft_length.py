"""The best draft length: what it gains pays for what its drafts cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drafttrain.core.errors import CheckpointError
from drafttrain.eval.interval import Interval
from drafttrain.serving.draft_length import best_length
from tests.eval import results
from tests.serving.evaluations import evaluation


@pytest.mark.parametrize(("cost", "best"), [(0.0, 8), (0.1, 4), (0.3, 2), (2.0, 1)])
def test_the_best_length_pays_for_its_drafts(cost, best):
    replay = {1: 1.7, 2: 2.2, 4: 2.8, 8: 3.0}
    found = best_length(evaluation(replay, length=4, cost=cost))
    assert found.num_draft_tokens == best
    assert found.mbsu == pytest.approx(max(value / (1 + cost * k) for k, value in replay.items()))


def test_no_longer_than_the_drafter_has_heads():
    assert best_length(evaluation({1: 1.7, 2: 2.2, 4: 2.8}, length=4, cost=0.0), most=3).num_draft_tokens == 2


@pytest.mark.parametrize("changes", [{"mbsu": float("nan")}, {"replay": {"1": Interval(float("nan"), 1.0, 2.0)}}])
def test_a_figure_that_is_missing_gives_no_draft_length(changes):
    damaged = results.figures(replay={"1": results.INTERVAL}) if "replay" not in changes else results.figures()
    with pytest.raises(CheckpointError, match="no draft length can be computed"):
        best_length(results.result({"drafter": replace(damaged, **changes)}))


def test_an_evaluation_without_chains_has_no_best_length():
    tree = results.figures(length={"kind": "tree", "num_draft_tokens": 24})
    with pytest.raises(CheckpointError, match="no chain of fixed length"):
        best_length(results.result({"tree": tree}))
