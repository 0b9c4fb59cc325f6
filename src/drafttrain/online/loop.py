"""From logs to published drafters, once or for ever; after a kill, what came since the last update is done again.

online/intake/        what was taken up of the logs
online/state.pt       all drafters in training, their buffers and counts, whole after every update
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

from drafttrain.core.console import say
from drafttrain.core.files import write_text, written_beside
from drafttrain.online.route import Route, Workshop
from drafttrain.online.router import Router
from drafttrain.online.run_files import metrics, with_current_keys
from drafttrain.online.versions import Versions, publish_first
from drafttrain.recorder.intake import Intake

UNSAVED_BATCHES = 64
"""Without an update the state is written that seldom: after a kill, batches are sorted into the buffers again."""


class OnlineRun:
    """Learning in a run folder.

    Args:
        start: The drafter that everything starts with, as an exported folder.
    """

    def __init__(self, shop: Workshop, intake: Intake, folder: Path, *, start: Path) -> None:
        self.shop = shop
        self.intake = intake
        self.folder = folder
        settings = shop.online
        self.router = Router(settings.router) if settings.router else None
        self.routes: dict[str, Route] = {}
        for name in self.router.routes if self.router else [""]:
            versions = Versions(
                folder / "drafters" / name,
                keep=settings.keep_versions,
                hook=settings.on_publish,
                hook_timeout_seconds=settings.hook_timeout_seconds,
            )
            versions.mend()
            publish_first(versions, start)
            self.routes[name] = Route(name, shop, versions)
        self.batches = 0
        """Batches of the intake that were learned from."""
        self._saved = 0
        """Of these, the ones that the state on the disk holds."""
        self._state = folder / "online" / "state.pt"
        self._metrics = folder / "online" / "metrics.jsonl"
        self._resume()

    def _resume(self) -> None:
        if not self._state.exists():
            self._metrics.unlink(missing_ok=True)
            # A kill behind the first publish starts again from what was served before it.
            self._save()
            return
        stored = torch.load(self._state, weights_only=True, map_location=self.shop.target.device)
        state = with_current_keys(stored)
        self.batches = self._saved = state["batches"]
        for name, route in self.routes.items():
            route.restore(state["routes"][name])
        if self.router:
            self.router.restore(state["router"])
        kept = [row for row in metrics(self.folder) if row["update"] <= self.routes[row["route"]].counts["updates"]]
        write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
        say(f"continuing after {sum(route.counts['requests'] for route in self.routes.values()):,} requests")

    def once(self) -> None:
        """Learn from the logs that there are."""
        while self._take():
            pass
        for route in self.routes.values():
            if self.shop.online.every_minutes is not None and route.counts["requests"]:
                self._note(route.update())
        self._save()

    def for_ever(self, after_update: Callable[[], None]) -> None:
        """Go on as the logs grow, until the process is told to stop."""
        while True:
            updates = self._updates()
            taken = self._take()
            for route in self.routes.values():
                route.look_at_current()
                if route.is_time():
                    self._note(route.update())
                    self._save()
            if self._updates() > updates:
                after_update()
            if not taken:
                time.sleep(self.shop.online.poll_seconds)

    def _updates(self) -> int:
        return sum(route.counts["updates"] for route in self.routes.values())

    def _take(self) -> bool:
        """Learn from the next batch; tell whether there was one."""
        if self.batches == self.intake.num_batches and self.intake.take(max_lines=self.shop.online.max_lines) is None:
            return False
        requests = list(self.intake.served(first_batch=self.batches, stop_batch=self.batches + 1))
        for route in self.routes.values():
            route.look_at_current()
        by_route: dict[str, list[Any]] = {name: [] for name in self.routes}
        for one in requests:
            by_route[self.router.route(one.record) if self.router else ""].append(one)
        if self.router:
            self.router.learn([one.record for one in requests])
            self.router.save(self.folder / "drafters" / "router.safetensors")
        rows = [row for name, route in self.routes.items() for row in route.take(by_route[name])]
        self._note(rows)
        self.batches += 1
        if rows or self.batches - self._saved >= UNSAVED_BATCHES:
            self._save()
        return True

    def _note(self, rows: list[dict[str, Any]]) -> None:
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
        # What the state before this one stood on was needed until now.
        self.intake.forget(stop_batch=self._saved)
        for route in self.routes.values():
            route.versions.prune(held=route.version)
