"""`sweep`: a recipe with every combination of some values."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import RUNS, Debug, RecipeOrFolder, Runs, Smoke, exit_codes
from drafttrain.core.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(sweep)


def sweep(
    recipe: RecipeOrFolder,
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=V1,V2",
            help="Two or more values of a key: train.lr=1e-4,3e-4 loss.kind=tvd,tvdpp. One value holds for all arms. Commas "
            "inside brackets or quotes belong to a value.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option("--grid", metavar="FILE", help="Axes with named values (docs/sweep.md).", show_default=False),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="0,1", help="Seeds of each arm. Default: the recipe's own.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the runs. Default: runs/NAME-sweep.", show_default=False),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Run a recipe for every combination of values on the same data; one table with paired intervals, one picture."""
    with exit_codes(debug=debug):
        numbers = _seeds(seeds)
        from drafttrain.commands.sweep import sweep

        sweep(recipe, values or [], grid=grid, seeds=numbers, out=out, runs=runs, smoke=smoke)


def _seeds(text: str | None) -> list[int]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise RecipeError("arguments", [f"--seeds: whole numbers from 0 on, such as 0,1,2; got {text!r}"])
    numbers = [int(word) for word in words]
    if len(set(numbers)) < len(numbers):
        raise RecipeError("arguments", [f"--seeds: each seed once; got {text!r}"])
    return numbers
