"""Settings of online learning. Imports neither lightning nor an HTTP library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from drafttrain.core.settings import setting


@dataclass
class RouterSettings:
    """Several drafters, each for a part of the traffic."""

    kind: Literal["tag", "classifier"] = setting(
        "tag",
        help="tag: by the request's `domain`. classifier: by `domain` if the request has one, else by the tokens of the prompt; "
        "learned from the requests with a `domain`.",
    )
    routes: list[str] = setting(
        [], help="Domains with their own drafter. The first one also serves all other requests."
    )
    num_buckets: int = setting(4096, help="classifier: number of features that token ids are hashed into.", ge=2)
    min_examples: int = setting(64, help="classifier: tagged requests needed before its predictions are used.", ge=1)

    def check(self) -> list[str]:
        """Return the problems across fields."""
        problems = []
        if len(self.routes) < 2:
            problems.append("routes: at least two are needed; remove `router` for a single drafter")
        for route in self.routes:
            if not route or not route.isascii() or not route.replace("-", "").replace("_", "").isalnum():
                problems.append(f"routes: must be a valid folder name (letters, digits, - and _), got {route!r}")
            if route.isdigit() or route == "current":
                problems.append(f"routes: {route!r} is reserved for versions; choose another name")
        if len(set(self.routes)) < len(self.routes):
            problems.append("routes: duplicate name")
        return problems


@dataclass
class OnlineSettings:
    """How a drafter learns from its traffic, and when a new version replaces it."""

    positions: Literal["refused", "all"] = setting(
        "refused",
        help="Where the loss is taken. refused: where the target refused a draft token (from the log, else by replay of the current "
        "drafter). all: at all tokens of the answer.",
    )
    every_requests: int | None = setting(
        64, help="Requests of a route between two updates; null: use every_minutes.", ge=1
    )
    every_minutes: float | None = setting(None, help="Minutes between two updates; null: use every_requests.", gt=0)
    steps: int = setting(8, help="Optimizer steps per update, of train.batch_size requests each.", ge=1)
    buffer: int = setting(2048, help="Capacity of the replay buffer, in requests.", ge=2)
    recent: float = setting(0.5, help="Share of the newest requests in the buffer and in each batch.", gt=0, lt=1)
    user_quota: float = setting(
        0.1, help="Maximum share of one user in the buffer and in the held-out requests; 1: no limit.", gt=0, le=1
    )
    held_out: float = setting(
        0.2, help="Share of the requests that is never trained on. Candidates are compared on it.", gt=0, lt=1
    )
    window: int = setting(128, help="Number of newest held-out requests for comparisons.", ge=4)
    min_held_out: int = setting(24, help="Minimum held-out requests for judging a candidate or testing drift.", ge=4)
    implausible: float | None = setting(
        6.0,
        help="Standard deviations by which an answer may be less likely than the target's own samples at temperature 1. A less "
        "likely answer was not written by the target and is ignored. null: no test.",
        gt=0,
    )
    temperature: float = setting(
        0.0,
        help="Temperature for replaying refusals and candidates. 0: greedy drafts, correct at any serving temperature.",
        ge=0,
    )
    promote_every: int = setting(1, help="Updates between two candidates.", ge=1)
    significance: float = setting(
        0.05, help="p-value below which a candidate is better, or drift is detected.", gt=0, lt=1
    )
    parity_prompts: int = setting(
        4, help="Held-out requests on which the exported files must decode the same text as the target alone.", ge=1
    )
    restart_after: int = setting(
        4, help="Consecutive refused candidates before learning restarts from the current drafter.", ge=1
    )
    keep_versions: int = setting(10, help="Published versions to keep.", ge=2)
    on_publish: list[str] = setting(
        [],
        help="Command to run after a version is published or rolled back, as a list of words without a shell. {path} and {version} "
        "are replaced.",
    )
    hook_timeout_seconds: float = setting(60.0, help="Time limit of the on_publish command.", gt=0)
    poll_seconds: float = setting(2.0, help="Seconds between two looks for new log lines.", gt=0)
    max_lines: int = setting(256, help="Maximum lines to read at once.", ge=1)
    resamples: int = setting(2000, help="Permutations in the drift test.", ge=100)
    router: RouterSettings | None = setting(None, help="Several drafters for parts of the traffic; null: one drafter.")

    def check(self) -> list[str]:
        """Return the problems across fields."""
        problems = []
        if (self.every_requests is None) == (self.every_minutes is None):
            problems.append(
                "every_requests: set exactly one of every_requests and every_minutes, and the other to null"
            )
        if self.min_held_out > self.window:
            problems.append(f"min_held_out: must be at most window ({self.window}), got {self.min_held_out}")
        return problems

    def smoke(self) -> OnlineSettings:
        """Return a copy that updates and compares twice on the bundled log."""
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
