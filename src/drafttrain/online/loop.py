"""Online learning in a run folder, once or forever. After a kill, the work since the last update is repeated.

online/intake/        records that were read from the logs
online/state.pt       all drafters in training, their buffers and counts; replaced as a whole after every update
online/metrics.jsonl  a row for each update
drafters/             the versions of the drafter, or drafters/ROUTE/ and the router
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drafttrain.core.console import say, say_once
from drafttrain.core.files import write_text, written_beside
from drafttrain.online.route import OnlineSetup, Route
from drafttrain.online.router import Router
from drafttrain.online.run_files import metrics, with_current_keys
from drafttrain.online.versions import Versions, publish_first
from drafttrain.recorder.intake import Intake

MAX_UNSAVED_BATCHES = 64
"""Without an update, the state is written after this many batches. After a kill, later batches are processed again."""


class OnlineRun:
    """Learning in a run folder.

    Args:
        start: Exported folder of the first drafter.
    """

    def __init__(self, setup: OnlineSetup, intake: Intake, folder: Path, *, start: Path) -> None:
        self.setup = setup
        self.intake = intake
        self.folder = folder
        settings = setup.online
        self.router = Router(settings.router) if settings.router else None
        self.routes: dict[str, Route] = {}
        for name in self.router.routes if self.router else [""]:
            versions = Versions(
                folder / "drafters" / name,
                keep=settings.keep_versions,
                hook=settings.on_publish,
                hook_timeout_seconds=settings.hook_timeout_seconds,
            )
            versions.repair()
            publish_first(versions, start)
            self.routes[name] = Route(name, setup, versions)
        self.batches = 0
        """Batches of the intake that were processed."""
        self._saved = 0
        """Batches that the state on disk includes."""
        self._state = folder / "online" / "state.pt"
        self._metrics = folder / "online" / "metrics.jsonl"
        self._resume()

    def _resume(self) -> None:
        if not self._state.exists():
            self._metrics.unlink(missing_ok=True)
            # After a kill that follows the first publish, the run restarts from the version before it.
            self._save()
            return
        stored = torch.load(self._state, weights_only=True, map_location=self.setup.target.device)
        state = with_current_keys(stored)
        self.batches = self._saved = state["batches"]
        for name, route in self.routes.items():
            route.restore(state["routes"][name])
        if self.router:
            self.router.restore(state["router"])
        kept = [row for row in metrics(self.folder) if row["update"] <= self.routes[row["route"]].counts["updates"]]
        write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
        say(f"resumed after {sum(route.counts['requests'] for route in self.routes.values()):,} requests")

    def learn_once(self) -> None:
        """Learn from all log lines that exist now."""
        while self._take():
            pass
        for route in self.routes.values():
            if self.setup.online.every_minutes is not None and route.counts["requests"]:
                self._log_metrics(route.update())
        self._save()

    def learn_forever(self, after_update: Callable[[], None]) -> None:
        """Learn as the logs grow, until the process is stopped."""
        while True:
            updates = self._updates()
            taken = self._take()
            for route in self.routes.values():
                route.follow_rollback()
                if route.update_is_due():
                    self._log_metrics(route.update())
                    self._save()
            if self._updates() > updates:
                after_update()
            if not taken:
                say_once("all log lines are read; waiting for new ones (Ctrl-C stops, the same command continues)")
                time.sleep(self.setup.online.poll_seconds)

    def _updates(self) -> int:
        return sum(route.counts["updates"] for route in self.routes.values())

    def _take(self) -> bool:
        """Learn from the next batch. Return whether there was one."""
        if self.batches == self.intake.num_batches and self.intake.take(max_lines=self.setup.online.max_lines) is None:
            return False
        requests = list(self.intake.served(first_batch=self.batches, stop_batch=self.batches + 1))
        for route in self.routes.values():
            route.follow_rollback()
        by_route: dict[str, list[Any]] = {name: [] for name in self.routes}
        for one in requests:
            by_route[self.router.route(one.record) if self.router else ""].append(one)
        if self.router:
            self.router.learn([one.record for one in requests])
            self.router.save(self.folder / "drafters" / "router.safetensors")
        rows = [row for name, route in self.routes.items() for row in route.take(by_route[name])]
        self._log_metrics(rows)
        self.batches += 1
        if rows or self.batches - self._saved >= MAX_UNSAVED_BATCHES:
            self._save()
        return True

    def _log_metrics(self, rows: list[dict[str, Any]]) -> None:
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _save(self) -> None:
        state = {
            "batches": self.batches,
            "routes": {name: route.state() for name, route in self.routes.items()},
            "router": self.router.state() if self.router else {},
        }
        with written_beside(self._state) as temporary:
            torch.save(state, temporary)
        self._saved = self.batches
        # The previous state still needed older batches and versions.
        self.intake.forget(stop_batch=self._saved)
        for route in self.routes.values():
            route.versions.prune(held=route.version)
