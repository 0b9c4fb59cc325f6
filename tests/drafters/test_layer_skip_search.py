"""The search for sublayers to skip: idle ones are found, the budget is honoured, an interrupted search continues.

S = sublayers, N = sets
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from drafttrain.drafters.layer_skip import windows as windows_module
from drafttrain.drafters.layer_skip.search import (
    Search,
    SearchSettings,
    as_chosen,
    as_skipped,
    num_skipped,
    spread,
    upper_bounds,
)
from drafttrain.target_model import Target
from drafttrain.target_model.sublayers import Skipped
from tests.conftest import random_llama
from tests.drafters.test_layer_skip import idle, made, wrapped, written


@pytest.fixture(scope="module")
def target() -> Target:
    return wrapped(random_llama(num_layers=5).double())


def test_inserted_idle_sublayers_are_found(tmp_path):
    """An attention and an MLP with zero output are the set of two that changes nothing. Control: without them none is."""
    hidden = Skipped(attention=(4,), mlp=(2,))
    target = wrapped(idle(random_llama(num_layers=6).double(), hidden))
    drafter = made(target, ratio=0.25, window=12)
    assert drafter.skipped != hidden
    drafter.search(target, written(target), num_steps=100, seed=0, log=tmp_path / "search.jsonl")
    assert (drafter.skipped, drafter.score) == (hidden, 1.0)
    plain = wrapped(random_llama(num_layers=6).double())
    other = made(plain, ratio=0.25, window=12)
    other.search(plain, written(plain), num_steps=8, seed=0, log=tmp_path / "other.jsonl")
    assert other.score is not None
    assert other.score < 0.9


@pytest.mark.parametrize("bayes_every", [1, 7, 10**6])
def test_every_set_skips_as_many_as_the_budget_and_the_best_score_never_falls(bayes_every):
    random = np.random.default_rng(3)
    worth = random.random(12)
    search = Search(12, spread(8, 0.45), SearchSettings(bayes_every=bayes_every, enough=1.0), seed=1)
    assert len(spread(8, 0.45)) == int(12 * 0.45) == 5
    best, seen = 0.0, set()
    for _ in range(60):
        chosen = search.propose()
        assert len(set(chosen)) == 5
        assert set(chosen) <= set(range(12))
        assert chosen not in seen, "no set is scored twice"
        seen.add(chosen)
        search.observe(chosen, float(worth[list(chosen)].mean()))
        assert search.best_score >= best
        best = search.best_score
    assert best == max(float(worth[list(chosen)].mean()) for chosen in seen)


def test_the_bayesian_step_finds_more_than_random_sets():
    """The score of a set is the sum of what its sublayers are worth: 38,760 sets, of which 60 are scored."""

    def found(bayes_every: int, seed: int) -> float:
        worth = np.random.default_rng(100 + seed).random(20) / 6
        search = Search(20, spread(12, 0.3), SearchSettings(bayes_every=bayes_every, enough=1.0), seed=seed)
        for _ in range(60):
            chosen = search.propose()
            search.observe(chosen, float(worth[list(chosen)].sum()))
        return search.best_score / float(np.sort(worth)[-6:].sum())

    bayesian, random = ([found(every, seed) for seed in range(3)] for every in (1, 10**6))
    assert min(bayesian) > 0.99
    assert max(random) < 0.95


def test_the_process_passes_through_the_scores_and_is_unsure_elsewhere():
    """Against the formulas with an inverse matrix, written out here for one length scale."""
    random = np.random.default_rng(0)
    seen_NS = np.array([np.isin(np.arange(10), random.choice(10, 4, replace=False)) for _ in range(12)]).astype(float)
    scores_N = seen_NS @ random.random(10)
    asked_MS = np.array([np.isin(np.arange(10), random.choice(10, 4, replace=False)) for _ in range(5)]).astype(float)

    def kernel(one: Any, other: Any, scale: float) -> Any:
        r = np.sqrt(5) * np.linalg.norm(one[:, None] - other[None], axis=-1) / scale
        return (1 + r + r**2 / 3) * np.exp(-r)

    wanted = []
    for scale in (0.5, 1.0, 2.0, 4.0):
        inner = kernel(seen_NS, seen_NS, scale) + 1e-4 * np.eye(12)
        values = (scores_N - scores_N.mean()) / scores_N.std()
        likelihood = -0.5 * values @ np.linalg.inv(inner) @ values - 0.5 * np.linalg.slogdet(inner)[1]
        across = kernel(asked_MS, seen_NS, scale)
        mean = across @ np.linalg.inv(inner) @ values
        variance = 1 - np.einsum("mn,nk,mk->m", across, np.linalg.inv(inner), across)
        wanted.append((likelihood, scores_N.mean() + scores_N.std() * (mean + 2.5 * np.sqrt(variance))))
    np.testing.assert_allclose(
        upper_bounds(seen_NS, scores_N, asked_MS), max(wanted, key=lambda one: one[0])[1], atol=1e-8
    )
    np.testing.assert_allclose(upper_bounds(seen_NS, scores_N, seen_NS), scores_N, atol=0.1 * scores_N.std())


def test_it_ends_at_enough_without_progress_or_when_every_set_is_scored():
    def run(scores: Any, **settings: Any) -> int:
        search = Search(4, (0, 2), SearchSettings(**settings), seed=0)
        while not search.ended:
            search.observe(search.propose(), scores(search.num_steps))
        return search.num_steps

    assert run(lambda step: 0.1 * step, enough=0.3) == 4
    assert run(lambda step: 0.5, patience=3) == 4
    assert run(lambda step: 0.5, patience=100) == 6


def test_sets_by_number_and_by_block_are_the_same():
    for size in (3, 5, 8):
        for chosen in itertools.combinations(range(2 * (size - 2)), 2):
            assert as_chosen(as_skipped(chosen)) == chosen
    assert as_skipped([0, 1, 5]) == Skipped(attention=(1,), mlp=(1, 3))
    assert [num_skipped(blocks, 0.45) for blocks in (3, 4, 32)] == [1, 1, 27]
    assert num_skipped(3, 0.9) == 1, "something is always left"


def test_an_interrupted_search_ends_with_the_same_set(target, tmp_path, monkeypatch):
    """Also after a line that was not finished. What was scored before is not scored again."""
    records, counted = written(target), [0]
    count = windows_module.matched

    def counting(*arguments: Any, **options: Any) -> int:
        counted[0] += 1
        return count(*arguments, **options)

    monkeypatch.setattr(windows_module, "matched", counting)
    whole, parts = made(target, ratio=0.5, bayes_every=5), made(target, ratio=0.5, bayes_every=5)
    assert whole.search(target, records, num_steps=12, seed=0, log=tmp_path / "whole.jsonl") == 12
    assert counted[0] == 12
    log = tmp_path / "parts.jsonl"
    made(target, ratio=0.5, bayes_every=5).search(target, records, num_steps=7, seed=0, log=log)
    log.write_text(log.read_text() + '{"skipped_attention": [1')
    counted[0] = 0
    parts.search(target, records, num_steps=12, seed=0, log=log)
    assert counted[0] == 5
    assert (parts.skipped, parts.score) == (whole.skipped, whole.score)
    assert log.read_text() == (tmp_path / "whole.jsonl").read_text()
    made(target, ratio=0.5, bayes_every=5).search(target, records, num_steps=12, seed=1, log=tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_text() != log.read_text(), "control: another seed tries other sets"
