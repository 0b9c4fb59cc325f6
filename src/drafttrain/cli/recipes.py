"""`recipe`: list, show, copy and check recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import (
    RUNS,
    Debug,
    Overrides,
    RecipeOrFolder,
    Smoke,
    exit_codes,
    names_and_overrides,
    recipe_and_run_folder,
)
from drafttrain.config.bundled import bundled_folder, bundled_recipes, copy_recipe
from drafttrain.core.console import complain, say, table
from drafttrain.core.errors import RecipeError

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)


@app.command(name="list")
def list_recipes() -> None:
    """List the recipes that come with drafttrain."""
    table([[one.name, one.title] for one in bundled_recipes()], columns=["recipe", "what it trains"])
    say(f"in {bundled_folder()}")


@app.command()
def show(recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, debug: Debug = False) -> None:
    """Print a recipe with every default visible and every key explained."""
    with exit_codes(debug=debug):
        from drafttrain.config.dump import dump_recipe

        loaded, _ = recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=RUNS)
        typer.echo(dump_recipe(loaded, comments=True), nl=False)


@app.command()
def copy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a bundled recipe.", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The copy. Default: RECIPE.yaml in this folder.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Copy a bundled recipe with its comments, to change it."""
    with exit_codes(debug=debug):
        say(f"written: {copy_recipe(recipe, to)}")


@app.command()
def check(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [SECTION.KEY=VALUE]...",
            help="YAML files or names of bundled recipes; then values that replace those of each recipe.",
        ),
    ],
    debug: Debug = False,
) -> None:
    """Check recipes without loading a model: ok, or every problem with its line."""
    with exit_codes(debug=debug):
        from drafttrain.commands.check_recipes import checked_recipes

        recipes, overrides = names_and_overrides(what)
        if not recipes:
            raise RecipeError("arguments", ["give a recipe before the values that replace its own"])
        checked = dict[str, str | None]()
        for recipe, problems in checked_recipes(recipes, overrides):
            checked[recipe] = problems
            typer.echo(f"{recipe}: ok") if problems is None else complain(problems)
        if any(checked.values()):
            raise typer.Exit(RecipeError.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from drafttrain.config.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
