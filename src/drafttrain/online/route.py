"""One drafter and its part of the traffic: training, held-out requests, and the served version."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafttrain.checkpoint import About, read_about, read_drafter
from drafttrain.core.console import say
from drafttrain.core.random import stream_seed
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.export.drafter import CalibrationTexts, DrafterExporter
from drafttrain.losses import Loss
from drafttrain.online.buffer import HeldOut, ReplayBuffer
from drafttrain.online.drift import drift
from drafttrain.online.learner import Learner
from drafttrain.online.plausible import surprise
from drafttrain.online.positions import refused_positions, text_of
from drafttrain.online.promotion import Judgement, judge, request_counts
from drafttrain.online.settings import OnlineSettings
from drafttrain.online.versions import Versions
from drafttrain.recorder.intake import Served
from drafttrain.target_model import Target
from drafttrain.training.settings import TrainSettings


@dataclass(frozen=True)
class OnlineSetup:
    """Target and settings that all routes of a run share."""

    target: Target
    online: OnlineSettings
    train: TrainSettings
    loss: Callable[[], Loss]
    max_length: int
    num_draft_tokens: int
    dtype: str
    """Data type of exported weights."""
    seed: int
    drafter: Any = None
    """Settings of its kind; None: what only training reads has its defaults."""


class Route:
    """A drafter that learns from its traffic.

    Args:
        name: Name of the route; empty: the only route.
    """

    def __init__(self, name: str, setup: OnlineSetup, versions: Versions) -> None:
        self.name = name
        self.setup = setup
        self.versions = versions
        online = setup.online
        self.buffer = ReplayBuffer(online.buffer, recent=online.recent, user_quota=online.user_quota, seed=setup.seed)
        self.held_out = HeldOut(online.window, user_quota=online.user_quota)
        self.counts = Counter[str]()
        """Requests, implausible ones, updates and candidates; also the logged tokens and rounds since the last update."""
        self.refused_in_a_row = 0
        self.drifted = False
        self.promoted_on: list[tuple[float, float]] = []
        """(tokens, rounds) of the requests on which the current version was promoted."""
        self.updated_at = time.time()
        self.version = versions.current()
        self._sampling = Sampling(online.temperature)
        self._start_from_current()

    def _start_from_current(self) -> None:
        """Restart learning from the served version."""
        target, learning = self.setup.target, self._read(dtype="float32")
        if self.setup.drafter is not None:
            learning.train_with(self.setup.drafter, target=target, tokenizer=target.tokenizer)
        self.learner = Learner(
            learning,
            self.setup.loss(),
            target=target,
            settings=self.setup.train,
            max_length=self.setup.max_length,
            num_tokens=target.num_tokens,
        )
        self.serving = self._read()
        self.refused_in_a_row = 0

    def _read(self, *, dtype: str | None = None) -> Drafter:
        return read_drafter(self.versions.path(self.version), self.setup.target, dtype=dtype)

    def follow_rollback(self) -> None:
        """If someone rolled a version back, restart learning from the served version."""
        current = self.versions.current()
        # A version of a later update was published by this run before a kill. That update is repeated.
        if current != self.version and self.versions.about(current)["update"] <= self.counts["updates"]:
            say(f"{self._prefix}{current} is served instead of {self.version}: learning restarts from it")
            self.version, self.promoted_on = current, []
            self._start_from_current()

    def take(self, requests: Sequence[Served]) -> list[dict[str, Any]]:
        """Add requests in order, and update whenever one is due. Return a row of metrics for each update."""
        rows = []
        every = self.setup.online.every_requests
        position = 0
        while position < len(requests):
            until = len(requests) if every is None else position + every - self.counts["requests"] % every
            group = requests[position:until]
            self._count_served(group)
            self._split(group)
            self.counts["requests"] += len(group)
            position += len(group)
            if every is not None and self.counts["requests"] % every == 0:
                rows += self.update()
        return rows

    def _count_served(self, group: Sequence[Served]) -> None:
        """Count the tokens and rounds that the serving stack logged."""
        logged = [one.record for one in group if one.record.num_rounds is not None]
        self.counts["served_tokens"] += sum(sum(record.loss_mask) for record in logged)
        self.counts["served_rounds"] += sum(record.num_rounds or 0 for record in logged)

    def update_is_due(self) -> bool:
        """Return whether `every_minutes` have passed since the last update."""
        minutes = self.setup.online.every_minutes
        # If the clock was set back, the elapsed time is unknown: update now instead of waiting for the clock to catch up.
        return minutes is not None and not 0 <= time.time() - self.updated_at < 60 * minutes

    def _split(self, group: Sequence[Served]) -> None:
        """Hold some requests out, and put the others with their refused positions into the buffer."""
        online, target = self.setup.online, self.setup.target
        kept = list(group)
        if online.implausible is not None:
            found = surprise(target, [one.record for one in kept])
            kept = [one for one, value in zip(kept, found, strict=True) if value <= online.implausible]
            self.counts["implausible"] += len(found) - len(kept)
        learned = []
        for one in kept:
            start = len(one.record.tokens) - sum(one.record.loss_mask)
            # Split by prompt, so that equal prompts never end up on both sides.
            side = stream_seed(self.setup.seed, "held out", tuple(one.record.tokens[:start])) / 2**63
            if side < online.held_out:
                self.held_out.add(one)
            else:
                learned.append(one)
        for one in learned if online.positions == "all" else self._with_refusals(learned):
            self.buffer.add(one)

    def _with_refusals(self, requests: Sequence[Served]) -> list[Served]:
        """Return the requests with refused positions, from the log or else by replay of the served drafter."""
        unknown = [one.record for one in requests if one.record.refused is None]
        found = (
            refused_positions(
                self.setup.target,
                self.serving,
                unknown,
                self._sampling,
                num_draft_tokens=self.setup.num_draft_tokens,
                seed=self.setup.seed,
            )
            if unknown
            else []
        )
        replayed = iter(found)
        marked = [
            one if one.record.refused is not None else replace(one, record=replace(one.record, refused=next(replayed)))
            for one in requests
        ]
        return [one for one in marked if one.record.refused]

    def update(self) -> list[dict[str, Any]]:
        """Learn from the buffer, test for drift, and judge the candidate. Return a row of metrics."""
        online = self.setup.online
        self.updated_at = time.time()
        self.counts["updates"] += 1
        row: dict[str, Any] = {
            "route": self.name,
            "update": self.counts["updates"],
            "requests": self.counts["requests"],
            "buffer": len(self.buffer),
            "version": self.version,
            "at": self.updated_at,
        }
        tokens, rounds = self.counts.pop("served_tokens", 0), self.counts.pop("served_rounds", 0)
        if rounds:
            row["served_block_efficiency"] = tokens / rounds
        if len(self.buffer):
            steps = [self._step() for _ in range(online.steps)]
            positions = sum(step.positions for step in steps)
            row["loss"] = sum(step.loss * step.positions for step in steps) / max(1, positions)
            row["positions"] = positions
        row |= self._drift()
        enough = len(self.held_out.requests) >= online.min_held_out
        if enough and len(self.buffer) and self.counts["updates"] % online.promote_every == 0:
            row |= self._judge_candidate()
        return [row]

    def _step(self) -> Any:
        online = self.setup.online
        recent = 1.0 if self.drifted else online.recent
        drawn = self.buffer.draw(self.setup.train.batch_size, step=self.learner.steps, recent=recent)
        return self.learner.step([one.record for one in drawn], positions=online.positions)

    def _drift(self) -> dict[str, Any]:
        """Compare recent traffic with the traffic of the last promotion."""
        online = self.setup.online
        recent = [one.record for one in self.held_out.requests[-max(online.min_held_out, online.window // 2) :]]
        if len(recent) < online.min_held_out:
            return {}
        counts = request_counts(
            self.setup.target, self.serving, recent, self._sampling, num_draft_tokens=self.setup.num_draft_tokens
        )
        if not self.promoted_on:
            self.promoted_on = counts
        found = drift(self.promoted_on, counts, resamples=online.resamples, seed=self.setup.seed)
        drifted = found.p_value < online.significance
        if drifted and not self.drifted:
            say(
                f"{self._prefix}traffic drift: block efficiency {found.then:.2f} -> {found.now:.2f}, p = {found.p_value:.2g}"
            )
        # While the traffic drifts, batches are drawn from the newest requests only.
        self.drifted = drifted
        return {
            "block_efficiency": found.now,
            "block_efficiency_then": found.then,
            "drift_p_value": found.p_value,
            "drifted": drifted,
        }

    def _judge_candidate(self) -> dict[str, Any]:
        """Export the candidate, compare it with the current version, and publish it if it is better."""
        online, update = self.setup.online, self.counts["updates"]
        self.counts["candidates"] += 1
        exported_before = self.versions.of_update(update)
        version = exported_before or self.versions.add(self._export, update=update)
        judgement, counts = judge(
            self.versions.path(version),
            self.versions.path(self.version),
            self.setup.target,
            [one.record for one in self.held_out.requests],
            sampling=self._sampling,
            num_draft_tokens=self.setup.num_draft_tokens,
            significance=online.significance,
            parity_prompts=online.parity_prompts,
        )
        judgement = self._published_before(judgement) if exported_before else self._published(version, judgement)
        change = f"{judgement.current:.2f} -> {judgement.block_efficiency:.2f}, p = {judgement.p_value:.2g}"
        say(f"{self._prefix}update {update}: {change}: {judgement.reason}")
        if not judgement.promoted:
            if not exported_before:
                self.versions.remove(version)
            self.versions.log_event("refused", update=update, **judgement.json())
            self.refused_in_a_row += 1
            if self.refused_in_a_row >= online.restart_after:
                self._start_from_current()
            return {"candidate": judgement.block_efficiency, "promoted": False, "reason": judgement.reason}
        self.version, self.promoted_on = version, counts
        self.drifted, self.refused_in_a_row = False, 0
        self.serving = self._read()
        return {"candidate": judgement.block_efficiency, "promoted": True, "reason": judgement.reason}

    def _published(self, version: str, judgement: Judgement) -> Judgement:
        """Publish a candidate that is better. Return the judgement, corrected if it could not be published."""
        if not judgement.promoted or self.versions.publish(version, instead_of=self.version, **judgement.json()):
            return judgement
        return replace(judgement, promoted=False, reason="another version was published or rolled back meanwhile")

    def _published_before(self, judgement: Judgement) -> Judgement:
        """Return the judgement for an update that published before a kill: it stands unless the version was rolled back since."""
        served = self.versions.about(self.versions.current())
        if served["update"] < self.counts["updates"]:
            return replace(judgement, promoted=False, reason="published before a restart, then rolled back")
        return replace(judgement, promoted=True)

    def _export(self, folder: Path) -> None:
        """Export the drafter in training for serving stacks."""
        about = read_about(self.versions.path(self.version))
        assert isinstance(about, About), "versions are drafttrain exports"
        held_out = [text_of(one.record) for one in self.held_out.requests]
        exporter = DrafterExporter(
            about, self.setup.target.tokenizer, self.setup.dtype, lambda: CalibrationTexts(held_out, self.setup.target)
        )
        exported = folder / "export"
        exporter.from_memory(self.learner.drafter, exported, steps=about.trained_steps + self.learner.steps)
        for path in sorted(exported.iterdir()):
            path.rename(folder / path.name)
        exported.rmdir()

    @property
    def _prefix(self) -> str:
        return f"{self.name}: " if self.name else ""

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`."""
        return {
            "version": self.version,
            "counts": dict(self.counts),
            "refused_in_a_row": self.refused_in_a_row,
            "drifted": self.drifted,
            "promoted_on": [list(pair) for pair in self.promoted_on],
            "updated_at": self.updated_at,
            "buffer": self.buffer.state(),
            "held_out": self.held_out.state(),
            "learner": self.learner.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.version = state["version"]
        self._start_from_current()
        self.counts = Counter(state["counts"])
        self.refused_in_a_row, self.drifted = state["refused_in_a_row"], state["drifted"]
        self.promoted_on = [(tokens, rounds) for tokens, rounds in state["promoted_on"]]
        self.updated_at = state["updated_at"]
        self.buffer.restore(state["buffer"])
        self.held_out.restore(state["held_out"])
        self.learner.restore(state["learner"])
