"""The replay buffer: the newest requests, and a fair sample of all that came before them.

Source: Vitter 1985, Random Sampling with a Reservoir; the quota makes one user's requests a reservoir of their own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from drafttrain.core.random import stream_seed
from drafttrain.recorder.intake import Served, served_as_json, served_from_json


class ReplayBuffer:
    """Two parts: what leaves the recent one is offered to the reservoir. A pure function of the seed and what was added.

    Args:
        recent: Share of the capacity for the newest requests.
        user_quota: Share of each part that one user may have. Requests that name no user are not limited.
    """

    def __init__(self, capacity: int, *, recent: float, user_quota: float, seed: int) -> None:
        self._sizes = {"recent": max(1, round(capacity * recent))}
        self._sizes["reservoir"] = max(1, capacity - self._sizes["recent"])
        self._quotas = {part: max(1, int(size * user_quota)) for part, size in self._sizes.items()}
        self._seed = seed
        self.recent: list[Served] = []
        self.reservoir: list[Served] = []
        self._offered = 0
        """Requests that the reservoir was offered."""
        self._offered_by = Counter[str]()

    def __len__(self) -> int:
        return len(self.recent) + len(self.reservoir)

    def add(self, served: Served) -> None:
        """Take up a request; the user's oldest one goes when there are too many of the same user."""
        self.recent.append(served)
        own = [i for i, other in enumerate(self.recent) if served.user and other.user == served.user]
        if len(own) > self._quotas["recent"]:
            self._offer(self.recent.pop(own[0]))
        elif len(self.recent) > self._sizes["recent"]:
            self._offer(self.recent.pop(0))

    def _offer(self, served: Served) -> None:
        """Keep a request with the chance that makes the reservoir a fair sample."""
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
        # There may be any number of users: who has nothing here begins anew.
        if all(other.user != left.user for other in self.reservoir):
            del self._offered_by[left.user]

    def draw(self, count: int, *, step: int, recent: float) -> list[Served]:
        """Return a batch: each request from the recent part with chance `recent`, from the reservoir else, and once at most."""
        draws = random.Random(stream_seed(self._seed, "batch", step))
        parts = [draws.sample(part, len(part)) for part in (self.recent, self.reservoir)]
        batch: list[Served] = []
        while len(batch) < count and any(parts):
            first, other = parts if draws.random() < recent else reversed(parts)
            batch.append((first or other).pop())
        return batch

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON can hold it."""
        parts = {name: [served_as_json(one) for one in getattr(self, name)] for name in ("recent", "reservoir")}
        return parts | {"offered": self._offered, "offered_by": dict(self._offered_by)}

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where `state` was written."""
        self.recent, self.reservoir = (_read(state[name]) for name in ("recent", "reservoir"))
        self._offered, self._offered_by = state["offered"], Counter(state["offered_by"])


class HeldOut:
    """The newest requests that are never trained on.

    The same quota holds, so that no user alone decides what is better. An answer counts once: a server that is stuck says the same to
    everybody, and a candidate that knows it by heart would look better than it is.
    """

    def __init__(self, window: int, *, user_quota: float) -> None:
        self._window = window
        self._quota = max(1, int(window * user_quota))
        self.requests: list[Served] = []

    def add(self, served: Served) -> None:
        """Take up a request; the oldest one goes, that of the same user where they have too many, or the one with the same answer."""
        answer = _answer(served)
        self.requests = [*(other for other in self.requests if _answer(other) != answer), served]
        own = [i for i, other in enumerate(self.requests) if served.user and other.user == served.user]
        if len(own) > self._quota:
            self.requests.pop(own[0])
        elif len(self.requests) > self._window:
            self.requests.pop(0)

    def state(self) -> list[dict[str, Any]]:
        """Return what `restore` needs, as JSON can hold it."""
        return [served_as_json(one) for one in self.requests]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Stand where `state` was written."""
        self.requests = _read(state)


def _answer(served: Served) -> tuple[int, ...]:
    record = served.record
    return tuple(record.tokens[len(record.tokens) - sum(record.loss_mask) :])


def _read(values: Sequence[dict[str, Any]]) -> list[Served]:
    return [served_from_json(value) for value in values]
