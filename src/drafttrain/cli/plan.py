"""`plan`: what a recipe costs, before anything is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import RUNS, Debug, Overrides, RecipeOrFolder, Smoke, exit_codes, recipe_and_run_folder
from drafttrain.config.bundled import find_recipe
from drafttrain.core.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(plan)


def plan(
    recipe: RecipeOrFolder,
    overrides: Overrides = None,
    gpu: Annotated[
        str,
        typer.Option("--gpu", metavar="NAME", help="h100, a100-80gb, l40s ...; cpu: no times. A wrong name lists all."),
    ] = "h100",
    mfu: Annotated[
        float, typer.Option("--mfu", help="Share of the GPU's peak that is assumed, above 0 and at most 1.")
    ] = 0.4,
    records: Annotated[
        int | None,
        typer.Option(
            "--records", min=1, help="Records of an epoch. Default: data.generate.num_records.", show_default=False
        ),
    ] = None,
    header: Annotated[
        bool, typer.Option("--header", help="Also write the figures into the comment at the top of the recipe's file.")
    ] = False,
    smoke: Smoke = False,
    debug: Debug = False,
) -> None:
    """Print parameters, memory, operations and hours of a recipe's training. Only the target's config.json is read.

    Exits with 1 if the training does not fit on the GPU, and prints what to change.
    """
    with exit_codes(debug=debug):
        loaded, _ = recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=RUNS)
        from drafttrain.commands.plan import print_plan

        if header and (overrides or smoke or Path(recipe).is_dir()):
            raise RecipeError("arguments", ["--header: needs the file of a recipe, without overrides and --smoke"])
        file = find_recipe(recipe) if header else None
        print_plan(loaded, gpu=gpu, utilization=mfu, records=records, header=file)
