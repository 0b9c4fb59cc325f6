"""drafttrain online: learn from serving logs, show the status of a run, roll a version back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafttrain.commands.made_models import check_run_parts
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say, table
from drafttrain.core.errors import RecipeError
from drafttrain.core.files import clear_leftovers
from drafttrain.online.report import write_online_report
from drafttrain.online.run_files import routes_of, status
from drafttrain.online.versions import Versions
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.online_run import online_run, report


def learn_online(recipe: Recipe, folder: Path, *, once: bool = False) -> None:
    """Learn from serving logs and publish better versions: once, or until the process is stopped."""
    if recipe.online is None:
        raise RecipeError(recipe.name, ["online: missing. This recipe does not learn online: run drafttrain fit"])
    with RunFolder(folder).locked():
        clear_leftovers(folder)
        check_run_parts(recipe, folder)
        run = DrafterRun(recipe, folder)
        run.write_start()
        learning = online_run(run.recipe, run.folder, run.target)
        if once:
            learning.learn_once()
            report(run.folder, title=recipe.name)
        else:
            learning.learn_forever(lambda: write_online_report(folder, run.folder.report, title=recipe.name))
    show_status(folder)


def rollback(folder: Path, *, route: str | None = None) -> None:
    """Serve the version that the current one replaced; `route` names one of several drafters."""
    routes = routes_of(folder)
    if (route or "") not in routes:
        known = ", ".join(name for name in routes if name)
        raise RecipeError("arguments", [f"this run has several drafters: give one of {known} after the folder"])
    held = RunFolder(folder).stored_recipe()
    settings = held.online if held is not None and held.online is not None else None
    hook = settings.on_publish if settings else []
    timeout = settings.hook_timeout_seconds if settings else 60.0
    versions = Versions(routes[route or ""].folder, hook=hook, hook_timeout_seconds=timeout)
    before, now = versions.rollback()
    say(f"{versions.folder / 'current'}: {now} again, instead of {before}")


def show_status(folder: Path) -> dict[str, Any]:
    """Print the status of an online run, and return it."""
    found = status(folder)
    columns = [
        "drafter",
        "serving",
        "requests",
        "updates",
        "published",
        "refused",
        "rolled back",
        "block efficiency",
        "as logged",
        "drift p",
    ]
    rows = [
        [
            name or "drafter",
            route["serving"],
            route["requests"],
            route["updates"],
            route["published"],
            route["refused"],
            route["rolled_back"],
            _number(route["block_efficiency"]),
            _number(route["served_block_efficiency"]),
            _number(route["drift_p_value"]),
        ]
        for name, route in found["routes"].items()
    ]
    table(
        rows,
        columns=columns,
        title=f"{folder}: block efficiency by replay on recent held-out requests, and as logged by the server",
    )
    lines = ", ".join(f"{kind} {count:,}" for kind, count in found["lines"].items()) or "none yet"
    say(f"log lines: {lines}")
    return found


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
