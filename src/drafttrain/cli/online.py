"""`online`: learning from serving logs."""

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from drafttrain.cli.app import (
    RUNS,
    Debug,
    Overrides,
    RecipeOrFolder,
    Runs,
    Smoke,
    existing_folder,
    exit_codes,
    recipe_and_run_folder,
)

app = typer.Typer(help="Learn from serving logs and publish better drafters.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]


@app.command()
def run(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Learn from serving logs as they grow, until it is stopped. Run again, it continues."""
    with exit_codes(debug=debug):
        loaded, run_folder = recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        _commands().learn_online(loaded, run_folder)


@app.command()
def status(run: Run, debug: Debug = False) -> None:
    """Print the versions, requests and block efficiency of an online run."""
    with exit_codes(debug=debug):
        _commands().show_status(existing_folder(run))


@app.command()
def rollback(
    run: Run,
    route: Annotated[
        str | None, typer.Argument(metavar="ROUTE", help="The drafter, where several are routed.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve the version before the current one again."""
    with exit_codes(debug=debug):
        _commands().rollback(existing_folder(run), route=route)


def _commands() -> ModuleType:
    # At the head of the file this would load torch for `drafttrain --help`.
    from drafttrain.commands import online

    return online
