"""Settings of online learning; imports neither lightning nor an HTTP stack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from drafttrain.core.settings import setting


@dataclass
class RouterSettings:
    """Several drafters, each for a part of the traffic."""

    kind: Literal["tag", "classifier"] = setting(
        "tag",
        help="tag: by the request's `domain`; classifier: by that where there is one, else by the words of the prompt, learned "
        "from the requests that have one.",
    )
    routes: list[str] = setting([], help="Domains with a drafter of their own; the first has all other requests too.")
    num_buckets: int = setting(4096, help="classifier: token ids are hashed into so many features.", ge=2)
    min_examples: int = setting(64, help="classifier: tagged requests to learn from before it is trusted.", ge=1)

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        if len(self.routes) < 2:
            problems.append("routes: at least two are needed; leave the router out for one drafter")
        for route in self.routes:
            if not route or not route.isascii() or not route.replace("-", "").replace("_", "").isalnum():
                problems.append(
                    f"routes: must be usable as the name of a folder (letters, digits, - and _), got {route!r}"
                )
            if route.isdigit() or route == "current":
                problems.append(f"routes: {route!r} is what versions are called; name the domain otherwise")
        if len(set(self.routes)) < len(self.routes):
            problems.append("routes: one is there twice")
        return problems


@dataclass
class OnlineSettings:
    """How a drafter follows its traffic, and when a new one replaces it."""

    positions: Literal["refused", "all"] = setting(
        "refused",
        help="Where the loss is taken: refused, where the target refused the current drafter's token (as the log says, else by "
        "replay), or at all answered tokens.",
    )
    every_requests: int | None = setting(
        64, help="Requests between two updates, of each route its own; null: every_minutes counts.", ge=1
    )
    every_minutes: float | None = setting(None, help="Minutes between two updates; null: every_requests counts.", gt=0)
    steps: int = setting(8, help="Optimizer steps an update, of train.batch_size requests each.", ge=1)
    buffer: int = setting(2048, help="Requests that the replay buffer holds.", ge=2)
    recent: float = setting(0.5, help="Share of the buffer, and of each batch, for the newest requests.", gt=0, lt=1)
    user_quota: float = setting(
        0.1, help="Share of the buffer, and of the held-out requests, that one user may have; 1: no limit.", gt=0, le=1
    )
    held_out: float = setting(
        0.2, help="Share of the requests that is never trained on: candidates are compared on it.", gt=0, lt=1
    )
    window: int = setting(128, help="Newest held-out requests that are compared on.", ge=4)
    min_held_out: int = setting(24, help="No candidate is considered, and no drift tested, on fewer of them.", ge=4)
    implausible: float | None = setting(
        6.0,
        help="An answer less likely under the target than its own draws at temperature 1 are, by so many standard deviations, was "
        "written by something else and is set aside; null: none is looked at.",
        gt=0,
    )
    temperature: float = setting(
        0.0,
        help="Replay of refusals and candidates: 0, greedy drafts, right at any serving temperature; else that one.",
        ge=0,
    )
    promote_every: int = setting(1, help="Updates between two candidates.", ge=1)
    significance: float = setting(0.05, help="A candidate, and a drift, needs a p-value below this.", gt=0, lt=1)
    parity_prompts: int = setting(
        4, help="Held-out requests on which the exported files must decode as the target alone.", ge=1
    )
    restart_after: int = setting(
        4, help="Candidates refused in a row before learning starts again from the current drafter.", ge=1
    )
    keep_versions: int = setting(10, help="Published versions that are kept.", ge=2)
    on_publish: list[str] = setting(
        [],
        help="Command that is run after a version was published or taken back, as a list of words, no shell; {path} and {version} "
        "are replaced.",
    )
    hook_timeout_seconds: float = setting(60.0, help="It is ended after that time.", gt=0)
    poll_seconds: float = setting(2.0, help="Seconds between two looks for new log lines.", gt=0)
    max_lines: int = setting(256, help="Lines that are taken up at once.", ge=1)
    resamples: int = setting(2000, help="Permutations of the test of drift.", ge=100)
    router: RouterSettings | None = setting(None, help="Several drafters for parts of the traffic; null: one for all.")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        if (self.every_requests is None) == (self.every_minutes is None):
            problems.append("every_requests: exactly one of every_requests and every_minutes is needed, the other null")
        if self.min_held_out > self.window:
            problems.append(f"min_held_out: {self.min_held_out} is more than the window of {self.window}")
        return problems

    def smoke(self) -> OnlineSettings:
        """Return a copy that updates and compares twice on the log that comes with drafttrain."""
        every = None if self.every_requests is None else 200
        return replace(
            self,
            every_requests=every,
            steps=min(self.steps, 2),
            held_out=0.5,
            window=16,
            min_held_out=4,
            parity_prompts=1,
            resamples=min(self.resamples, 200),
        )
