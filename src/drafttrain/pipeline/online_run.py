"""The stages of a recipe with the section `online`: its run's parts put together, the report, the words of status."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say, table
from drafttrain.pipeline.folder import RunFolder

if TYPE_CHECKING:
    from drafttrain.online.loop import OnlineRun
    from drafttrain.target_model import Target


def online_run(recipe: Recipe, folder: RunFolder, target: Target) -> OnlineRun:
    """Return the learning of a recipe where it stands; `start/` is written before."""
    from drafttrain.data_gen.encoder import Encoder
    from drafttrain.losses import losses
    from drafttrain.online.loop import OnlineRun
    from drafttrain.online.route import Workshop
    from drafttrain.recorder.intake import Intake

    assert recipe.online is not None
    intake = Intake(
        recipe.data.sources[0],
        Encoder(target.tokenizer, recipe.data.max_length),
        folder.path / "online" / "intake",
        about=target.tokenizer_fingerprint,
    )
    length = recipe.eval.length
    shop = Workshop(
        target=target,
        online=recipe.online,
        train=recipe.train,
        loss=lambda: losses.build(recipe.loss),
        max_length=recipe.data.max_length,
        num_draft_tokens=getattr(length, "depth", getattr(length, "num_draft_tokens", 5)),
        dtype=recipe.export.dtype,
        seed=recipe.seed,
    )
    return OnlineRun(shop, intake, folder.path, start=folder.start)


def show_status(folder: Path) -> dict[str, Any]:
    """Print how far the learning of a run is, and return it."""
    from drafttrain.online.run_files import status

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
        title=f"{folder}: block efficiency by replay on recent held-out requests, and of the rounds in the logs",
    )
    lines = ", ".join(f"{kind} {count:,}" for kind, count in found["lines"].items()) or "none yet"
    say(f"lines of the logs: {lines}")
    return found


def report(folder: RunFolder, *, title: str) -> None:
    """Write the page of the run."""
    from drafttrain.online.report import write_online_report

    write_online_report(folder.path, folder.report, title=title)
    say(f"report:  {folder.report}")


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
