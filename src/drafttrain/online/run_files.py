"""Reads the files of an online run: metrics, published versions and status. Imports no torch, so that `status` is quick."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafttrain.core.errors import DrafttrainError
from drafttrain.online.versions import Versions

CURRENT_KEYS = {"lane": "route", "lanes": "routes"}
"""Keys that older versions wrote into online/state.pt and online/metrics.jsonl, and what they are called now."""


def with_current_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored state or row of metrics with the keys of this version."""
    return {CURRENT_KEYS.get(key, key): value for key, value in stored.items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of all updates of a run. An incomplete line that a kill left is ignored."""
    path = folder / "online" / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(with_current_keys(json.loads(line)))
    return rows


def routes_of(folder: Path) -> dict[str, Versions]:
    """Return the published versions of a run, by route.

    Raises:
        DrafttrainError: No drafter is published in this folder.
    """
    # Folders of versions are skipped: one may be removed at this moment.
    drafters = folder / "drafters"
    routes = [path for path in drafters.glob("*") if not path.name.isdigit()]
    links = [folder / "current" for folder in (drafters, *sorted(routes))]
    found = {
        "" if link.parent == drafters else link.parent.name: Versions(link.parent)
        for link in links
        if link.is_symlink()
    }
    if not found:
        raise DrafttrainError(f"no published drafter in {folder}. Run drafttrain online run first.")
    return found


def status(folder: Path) -> dict[str, Any]:
    """Return the progress of a run: log lines, updates, promotions and the served versions."""
    cursor = folder / "online" / "intake" / "cursor.json"
    lines = json.loads(cursor.read_text(encoding="utf-8"))["lines"] if cursor.exists() else {}
    rows = metrics(folder)
    routes = {}
    for name, versions in routes_of(folder).items():
        own = [row for row in rows if row["route"] == name]
        events = Counter(event["event"] for event in versions.history())
        routes[name] = {
            "serving": versions.current(),
            "updates": own[-1]["update"] if own else 0,
            "requests": own[-1]["requests"] if own else 0,
            "block_efficiency": next((r["block_efficiency"] for r in reversed(own) if "block_efficiency" in r), None),
            "served_block_efficiency": next(
                (r["served_block_efficiency"] for r in reversed(own) if "served_block_efficiency" in r), None
            ),
            "drift_p_value": own[-1].get("drift_p_value") if own else None,
            **{event: events[event] for event in ("published", "refused", "rolled_back", "hook_failed")},
        }
    used = {"used", "announces"}
    quarantine = {kind: count for kind, count in lines.items() if kind not in used}
    return {"lines": lines, "quarantine": quarantine, "routes": routes}
