"""The router chooses the right drafter, and drift of the traffic is detected."""

from __future__ import annotations

import numpy as np
import torch

from drafttrain.core.texts import Record
from drafttrain.online.drift import drift
from drafttrain.online.router import Router
from drafttrain.online.settings import RouterSettings


def record(domain: str, number: int, *, tagged: bool) -> Record:
    draws = torch.Generator().manual_seed(number)
    low = 1 if domain == "code" else 80
    prompt = torch.randint(low, low + 120, (16,), generator=draws).tolist()
    return Record(str(number), [*prompt, 7], [False] * 16 + [True], domain=domain if tagged else "")


def test_a_classifier_learns_to_route_requests_without_a_tag(tmp_path):
    settings = RouterSettings(kind="classifier", routes=["prose", "code"], min_examples=20)
    router = Router(settings)
    assert router.route(record("code", 0, tagged=False)) == "prose"
    router.learn([record("code" if i % 2 else "prose", i, tagged=True) for i in range(200)])
    router.save(tmp_path / "router.safetensors")
    again = Router.load(tmp_path / "router.safetensors", settings)
    wanted = ["code" if i % 2 else "prose" for i in range(1000, 1200)]
    found = [again.route(record(domain, i, tagged=False)) for i, domain in enumerate(wanted, start=1000)]
    assert np.mean([a == b for a, b in zip(wanted, found, strict=True)]) > 0.85
    by_tag = Router(RouterSettings(kind="tag", routes=["prose", "code"]))
    assert [by_tag.route(record("code", 1, tagged=tagged)) for tagged in (True, False)] == ["code", "prose"]


def test_drift_is_detected_and_false_alarms_are_rare():
    generator = np.random.default_rng(0)

    def requests(rounds: float, count: int = 24) -> list[tuple[float, float]]:
        return [(20.0, float(r)) for r in generator.normal(rounds, 1.5, count).clip(5)]

    assert drift(requests(8), requests(11), resamples=300, seed=0).p_value < 0.01
    assert drift(requests(11), requests(8), resamples=300, seed=0).p_value > 0.9
    false_alarms = [drift(requests(8), requests(8), resamples=200, seed=i).p_value < 0.05 for i in range(100)]
    # 5 of 100 are expected; more than 13 happen once in two thousand runs.
    assert sum(false_alarms) <= 13
