"""One drafter and its part of the traffic: what is learned, what is held out, which version is served."""

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
from drafttrain.train.settings import TrainSettings


@dataclass(frozen=True)
class Workshop:
    """What all drafters of a run share."""

    target: Target
    online: OnlineSettings
    train: TrainSettings
    loss: Callable[[], Loss]
    max_length: int
    num_draft_tokens: int
    dtype: str
    """Of exported weights."""
    seed: int


class Route:
    """A drafter that follows its traffic.

    Args:
        name: Of the route; empty: the only one.
    """

    def __init__(self, name: str, shop: Workshop, versions: Versions) -> None:
        self.name = name
        self.shop = shop
        self.versions = versions
        online = shop.online
        self.buffer = ReplayBuffer(online.buffer, recent=online.recent, user_quota=online.user_quota, seed=shop.seed)
        self.held_out = HeldOut(online.window, user_quota=online.user_quota)
        self.counts = Counter[str]()
        """Requests, those that were set aside as implausible, updates, candidates; tokens and rounds as logged since the last update."""
        self.refused_in_a_row = 0
        self.drifted = False
        self.promoted_on: list[tuple[float, float]] = []
        """(tokens, rounds) of the requests that the current version was promoted on."""
        self.updated_at = time.time()
        self.version = versions.current()
        self._sampling = Sampling(online.temperature)
        self._start_from_current()

    def _start_from_current(self) -> None:
        """Learn on from the version that is served."""
        self.learner = Learner(
            self._read(dtype="float32"),
            self.shop.loss(),
            target=self.shop.target,
            settings=self.shop.train,
            max_length=self.shop.max_length,
            num_tokens=self.shop.target.num_tokens,
        )
        self.serving = self._read()
        self.refused_in_a_row = 0

    def _read(self, *, dtype: str | None = None) -> Drafter:
        return read_drafter(self.versions.path(self.version), self.shop.target, dtype=dtype)

    def look_at_current(self) -> None:
        """Follow somebody who took a version back: learning starts again from what is served."""
        current = self.versions.current()
        # A version of a later update is our own, published before a kill; that update will come again.
        if current != self.version and self.versions.about(current)["update"] <= self.counts["updates"]:
            say(f"{self._said}{current} is served instead of {self.version}: learning starts again from it")
            self.version, self.promoted_on = current, []
            self._start_from_current()

    def take(self, requests: Sequence[Served]) -> list[dict[str, Any]]:
        """Take up requests in their order, updating whenever it is time; return a row of metrics for each update."""
        rows = []
        every = self.shop.online.every_requests
        position = 0
        while position < len(requests):
            until = len(requests) if every is None else position + every - self.counts["requests"] % every
            group = requests[position:until]
            self._count_served(group)
            self._sort(group)
            self.counts["requests"] += len(group)
            position += len(group)
            if every is not None and self.counts["requests"] % every == 0:
                rows += self.update()
        return rows

    def _count_served(self, group: Sequence[Served]) -> None:
        """Add up what the serving stack logged of its own rounds."""
        logged = [one.record for one in group if one.record.num_rounds is not None]
        self.counts["served_tokens"] += sum(sum(record.loss_mask) for record in logged)
        self.counts["served_rounds"] += sum(record.num_rounds or 0 for record in logged)

    def is_time(self) -> bool:
        """Tell whether the minutes between two updates are over."""
        minutes = self.shop.online.every_minutes
        # Where the clock was set back nobody knows how long it is: waiting for it to come round again would take that long.
        return minutes is not None and not 0 <= time.time() - self.updated_at < 60 * minutes

    def _sort(self, group: Sequence[Served]) -> None:
        """Hold some requests out, put the others with their refused positions into the buffer."""
        online, target = self.shop.online, self.shop.target
        kept = list(group)
        if online.implausible is not None:
            found = surprise(target, [one.record for one in kept])
            kept = [one for one, value in zip(kept, found, strict=True) if value <= online.implausible]
            self.counts["implausible"] += len(found) - len(kept)
        learned = []
        for one in kept:
            start = len(one.record.tokens) - sum(one.record.loss_mask)
            # By the prompt, so that the same one is never on both sides.
            side = stream_seed(self.shop.seed, "held out", tuple(one.record.tokens[:start])) / 2**63
            if side < online.held_out:
                self.held_out.add(one)
            else:
                learned.append(one)
        for one in learned if online.positions == "all" else self._with_refusals(learned):
            self.buffer.add(one)

    def _with_refusals(self, requests: Sequence[Served]) -> list[Served]:
        """Return those of which a token was refused, with its position: as logged, else by replay of the served drafter."""
        unknown = [one.record for one in requests if one.record.refused is None]
        found = (
            refused_positions(
                self.shop.target,
                self.serving,
                unknown,
                self._sampling,
                num_draft_tokens=self.shop.num_draft_tokens,
                seed=self.shop.seed,
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
        """Learn from the buffer; then look for drift, and whether the candidate is better. Return a row of metrics."""
        online = self.shop.online
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
            row |= self._consider()
        return [row]

    def _step(self) -> Any:
        online = self.shop.online
        recent = 1.0 if self.drifted else online.recent
        drawn = self.buffer.draw(self.shop.train.batch_size, step=self.learner.steps, recent=recent)
        return self.learner.step([one.record for one in drawn], positions=online.positions)

    def _drift(self) -> dict[str, Any]:
        """Compare recent traffic with that of the last promotion."""
        online = self.shop.online
        recent = [one.record for one in self.held_out.requests[-max(online.min_held_out, online.window // 2) :]]
        if len(recent) < online.min_held_out:
            return {}
        counts = request_counts(
            self.shop.target, self.serving, recent, self._sampling, num_draft_tokens=self.shop.num_draft_tokens
        )
        if not self.promoted_on:
            self.promoted_on = counts
        found = drift(self.promoted_on, counts, resamples=online.resamples, seed=self.shop.seed)
        drifted = found.p_value < online.significance
        if drifted and not self.drifted:
            say(
                f"{self._said}the traffic drifts: block efficiency {found.then:.2f} -> {found.now:.2f}, p = {found.p_value:.2g}"
            )
        # While it does, batches are drawn from the newest requests alone.
        self.drifted = drifted
        return {
            "block_efficiency": found.now,
            "block_efficiency_then": found.then,
            "drift_p_value": found.p_value,
            "drifted": drifted,
        }

    def _consider(self) -> dict[str, Any]:
        """Export the candidate, hold it against the current version by their files, and publish it or not."""
        online, update = self.shop.online, self.counts["updates"]
        self.counts["candidates"] += 1
        made = self.versions.made_by(update)
        version = made or self.versions.add(self._export, update=update)
        judgement, counts = judge(
            self.versions.path(version),
            self.versions.path(self.version),
            self.shop.target,
            [one.record for one in self.held_out.requests],
            sampling=self._sampling,
            num_draft_tokens=self.shop.num_draft_tokens,
            significance=online.significance,
            parity_prompts=online.parity_prompts,
        )
        judgement = self._published_before(judgement) if made else self._published(version, judgement)
        said = f"{judgement.current:.2f} -> {judgement.block_efficiency:.2f}, p = {judgement.p_value:.2g}: {judgement.reason}"
        say(f"{self._said}update {update}: {said}")
        if not judgement.promoted:
            if not made:
                self.versions.drop(version)
            self.versions.note("refused", update=update, **judgement.json())
            self.refused_in_a_row += 1
            if self.refused_in_a_row >= online.restart_after:
                self._start_from_current()
            return {"candidate": judgement.block_efficiency, "promoted": False, "reason": judgement.reason}
        self.version, self.promoted_on = version, counts
        self.drifted, self.refused_in_a_row = False, 0
        self.serving = self._read()
        return {"candidate": judgement.block_efficiency, "promoted": True, "reason": judgement.reason}

    def _published(self, version: str, judgement: Judgement) -> Judgement:
        """Publish a candidate that is better; return the judgement with what became of it."""
        if not judgement.promoted or self.versions.publish(version, instead_of=self.version, **judgement.json()):
            return judgement
        return replace(judgement, promoted=False, reason="another version is served by now")

    def _published_before(self, judgement: Judgement) -> Judgement:
        """Return the judgement on what this update published before a kill: that stands, unless somebody took it back since."""
        served = self.versions.about(self.versions.current())
        if served["update"] < self.counts["updates"]:
            return replace(judgement, promoted=False, reason="it was published before, and taken back")
        return replace(judgement, promoted=True)

    def _export(self, folder: Path) -> None:
        """Write the drafter in training as serving stacks load it."""
        about = read_about(self.versions.path(self.version))
        assert isinstance(about, About), "versions are exports of ours"
        held_out = [text_of(one.record) for one in self.held_out.requests]
        exporter = DrafterExporter(
            about, self.shop.target.tokenizer, self.shop.dtype, lambda: CalibrationTexts(held_out, self.shop.target)
        )
        exported = folder / "export"
        exporter.from_memory(self.learner.drafter, exported, steps=about.trained_steps + self.learner.steps)
        for path in sorted(exported.iterdir()):
            path.rename(folder / path.name)
        exported.rmdir()

    @property
    def _said(self) -> str:
        return f"{self.name}: " if self.name else ""

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs."""
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
        """Stand where `state` was written."""
        self.version = state["version"]
        self._start_from_current()
        self.counts = Counter(state["counts"])
        self.refused_in_a_row, self.drifted = state["refused_in_a_row"], state["drifted"]
        self.promoted_on = [(tokens, rounds) for tokens, rounds in state["promoted_on"]]
        self.updated_at = state["updated_at"]
        self.buffer.restore(state["buffer"])
        self.held_out.restore(state["held_out"])
        self.learner.restore(state["learner"])
