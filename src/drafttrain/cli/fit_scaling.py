"""`fit-scaling`: how block efficiency grows with tokens and parameters."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, exit_codes
from drafttrain.core.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(name="fit-scaling")(fit)


def fit(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS...",
            help="Finished run folders, folders of a sweep, or .csv files (docs/scaling.md).",
            show_default=False,
        ),
    ],
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="tokens=1e9,parameters=1e6", help="Predict there.", show_default=False),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", metavar="FLOPS", help="Plan size and tokens of a training.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of scaling.json and scaling.png.")] = Path(
        "runs/scaling"
    ),
    debug: Debug = False,
) -> None:
    """Fit how block efficiency grows with trained tokens and drafter size, over finished runs, and plan a budget."""
    with exit_codes(debug=debug):
        point = None if at is None else _point(at)
        if budget is not None and not 0 < budget < float("inf"):
            raise RecipeError("arguments", [f"--budget: a number above 0, got {budget:g}"])
        from drafttrain.commands.fit_scaling import fit_runs

        fit_runs(runs, out=out, at=point, budget=budget)


def _point(text: str) -> dict[str, float]:
    """Return the values of `tokens=1e9,parameters=1e6`."""
    found = {}
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        twice = name in found
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = float("nan")
        if twice or name not in ("tokens", "parameters") or not 0 < found[name] < float("inf"):
            raise RecipeError(
                "arguments", [f"--at: tokens=NUMBER,parameters=NUMBER, each once and above 0; got {text!r:.80}"]
            )
    return found
