"""The replay buffer: the newest requests, and a uniform sample of all earlier ones.

Source: Vitter 1985, Random Sampling with a Reservoir. The quota gives each user a reservoir of their own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from drafttrain.core.random import stream_seed
from drafttrain.recorder.intake import Served, served_as_json, served_from_json


class ReplayBuffer:
    """Requests that leave the recent part are offered to the reservoir. The content depends only on the seed and the added requests.

    Args:
        recent: Share of the capacity for the newest requests.
        user_quota: Maximum share of one user in each part. Requests without a user are not limited.
    """

    def __init__(self, capacity: int, *, recent: float, user_quota: float, seed: int) -> None:
        self._sizes = {"recent": max(1, round(capacity * recent))}
        self._sizes["reservoir"] = max(1, capacity - self._sizes["recent"])
        self._quotas = {part: max(1, int(size * user_quota)) for part, size in self._sizes.items()}
        self._seed = seed
        self.recent: list[Served] = []
        self.reservoir: list[Served] = []
        self._offered = 0
        """Number of requests offered to the reservoir."""
        self._offered_by = Counter[str]()

    def __len__(self) -> int:
        return len(self.recent) + len(self.reservoir)

    def add(self, served: Served) -> None:
        """Add a request. If the user has too many, their oldest one leaves the recent part."""
        self.recent.append(served)
        own = [i for i, other in enumerate(self.recent) if served.user and other.user == served.user]
        if len(own) > self._quotas["recent"]:
            self._offer(self.recent.pop(own[0]))
        elif len(self.recent) > self._sizes["recent"]:
            self._offer(self.recent.pop(0))

    def _offer(self, served: Served) -> None:
        """Keep a request with the probability that makes the reservoir a uniform sample."""
        self._offered += 1
        self._offered_by[served.user] += 1
        draws = random.Random(stream_seed(self._seed, "reservoir", self._offered))
        own = [i for i, other in enumerate(self.reservoir) if served.user and other.user == served.user]
        left = served
        if len(own) >= self._quotas["reservoir"]:
            place = draws.randrange(self._offered_by[served.user])
            if place < len(own):
                left, self.reservoir[own[place]] = self.reservoir[own[place]], served
        elif len(self.reservoir) < self._sizes["reservoir"]:
            self.reservoir.append(served)
            return
        elif (place := draws.randrange(self._offered)) < len(self.reservoir):
            left, self.reservoir[place] = self.reservoir[place], served
        # The number of users is unbounded: the count of a user with no request left in the reservoir is dropped.
        if all(other.user != left.user for other in self.reservoir):
            del self._offered_by[left.user]

    def draw(self, count: int, *, step: int, recent: float) -> list[Served]:
        """Return a batch without repetition: each request comes from the recent part with probability `recent`, else from the reservoir."""
        draws = random.Random(stream_seed(self._seed, "batch", step))
        parts = [draws.sample(part, len(part)) for part in (self.recent, self.reservoir)]
        batch: list[Served] = []
        while len(batch) < count and any(parts):
            first, other = parts if draws.random() < recent else reversed(parts)
            batch.append((first or other).pop())
        return batch

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`, in JSON types."""
        parts = {name: [served_as_json(one) for one in getattr(self, name)] for name in ("recent", "reservoir")}
        return parts | {"offered": self._offered, "offered_by": dict(self._offered_by)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.recent, self.reservoir = (_read(state[name]) for name in ("recent", "reservoir"))
        self._offered, self._offered_by = state["offered"], Counter(state["offered_by"])


class HeldOut:
    """The newest requests that are never trained on.

    The quota holds here too, so that no single user decides which drafter is better. Of requests with equal answers only the newest is
    kept: a server that repeats one answer would make a candidate that memorized it look better than it is.
    """

    def __init__(self, window: int, *, user_quota: float) -> None:
        self._window = window
        self._quota = max(1, int(window * user_quota))
        self.requests: list[Served] = []

    def add(self, served: Served) -> None:
        """Add a request. It replaces one with the same answer, else the user's oldest one beyond the quota, else the oldest one."""
        answer = _answer(served)
        self.requests = [*(other for other in self.requests if _answer(other) != answer), served]
        own = [i for i, other in enumerate(self.requests) if served.user and other.user == served.user]
        if len(own) > self._quota:
            self.requests.pop(own[0])
        elif len(self.requests) > self._window:
            self.requests.pop(0)

    def state(self) -> list[dict[str, Any]]:
        """Return the state for `restore`, in JSON types."""
        return [served_as_json(one) for one in self.requests]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore a state."""
        self.requests = _read(state)


def _answer(served: Served) -> tuple[int, ...]:
    record = served.record
    return tuple(record.tokens[len(record.tokens) - sum(record.loss_mask) :])


def _read(values: Sequence[dict[str, Any]]) -> list[Served]:
    return [served_from_json(value) for value in values]
