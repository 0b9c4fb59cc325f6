"""The report of an online run: block efficiency over requests, promotions, drift, quarantined lines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from drafttrain.core.files import write_text
from drafttrain.eval.page import label, page, picture
from drafttrain.online.run_files import metrics, routes_of, status


def write_online_report(folder: Path, path: Path, *, title: str) -> None:
    """Write the report of a run folder."""
    rows = metrics(folder)
    events = [{"route": name} | event for name, versions in routes_of(folder).items() for event in versions.history()]
    events.sort(key=lambda event: event["at"])
    plot = picture(lambda axes: _efficiency(axes, rows), columns=2)
    template = (resources.files("drafttrain") / "online" / "report.html").read_text(encoding="utf-8")
    write_text(path, page(template).render(title=title, status=status(folder), events=events, plot=plot))


def _efficiency(axes: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    for name in dict.fromkeys(row["route"] for row in rows):
        own = [row for row in rows if row["route"] == name and "block_efficiency" in row]
        requests = [row["requests"] for row in own]
        (line,) = axes[0].plot(requests, [row["block_efficiency"] for row in own], label=label(name or "drafter"))
        logged = [row for row in rows if row["route"] == name and "served_block_efficiency" in row]
        axes[0].plot(
            [row["requests"] for row in logged],
            [row["served_block_efficiency"] for row in logged],
            "--",
            color=line.get_color(),
            label=label(f"{name or 'drafter'}, logged rounds") if logged else None,
        )
        better = [row for row in own if row.get("promoted")]
        axes[0].plot([r["requests"] for r in better], [r["candidate"] for r in better], "^", color=line.get_color())
        for before, row in itertools.pairwise(own):
            if row.get("drifted") and not before.get("drifted"):
                axes[0].axvline(row["requests"], color=line.get_color(), linestyle=":")
        axes[1].semilogy(requests, [row["drift_p_value"] for row in own], color=line.get_color())
    axes[0].set(
        xlabel="requests",
        ylabel="block efficiency",
        title="served drafter; triangles: promoted; dotted: drift detected",
    )
    axes[1].set(xlabel="requests", ylabel="p-value", title="drift")
    if rows:
        axes[0].legend(fontsize=8, frameon=False)
