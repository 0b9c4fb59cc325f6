"""`data`: the records of a recipe as training reads them, and their faults."""

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from drafttrain.cli.app import (
    RUNS,
    Debug,
    KeyVariable,
    Overrides,
    RecipeOrFolder,
    Runs,
    Smoke,
    exit_codes,
    recipe_and_run_folder,
)

app = typer.Typer(help="Look at the records of a recipe, and find their faults.", no_args_is_help=True)


@app.command()
def inspect(
    recipe: RecipeOrFolder,
    overrides: Overrides = None,
    number: Annotated[int, typer.Option("--number", min=1, help="Items shown of each source.")] = 5,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Items of each source before the first shown.")] = 0,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write a page with one element a token instead.", show_default=False
        ),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Print records with their trained tokens coloured. Loads no model, only the target's tokenizer."""
    with exit_codes(debug=debug):
        loaded, run_folder = recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        _commands().inspect_data(loaded, run_folder, number=number, skip=skip, html=html)


@app.command()
def check(
    recipe: RecipeOrFolder,
    overrides: Overrides = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="A vLLM server of the target: chats are compared with its /tokenize.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="The target as the server calls it.", show_default=False),
    ] = None,
    api_key_variable: KeyVariable = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write every finding here as JSON lines.", show_default=False),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Find faults of masks, templates and answers, duplicates, and other tokenizations. Exits with 3 if there are faults."""
    with exit_codes(debug=debug):
        loaded, run_folder = recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        _commands().check_data(
            loaded, run_folder, server=server, model=model, api_key_variable=api_key_variable, out=out
        )


def _commands() -> ModuleType:
    # At the head of the file this would load torch for `drafttrain --help`.
    from drafttrain.commands import data_files

    return data_files
