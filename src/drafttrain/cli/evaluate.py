"""`eval`: an exported drafter on its target."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import (
    RUNS,
    Debug,
    Runs,
    Smoke,
    exit_codes,
    names_and_overrides,
    only_first_process,
    recipe_and_run_folder,
)
from drafttrain.config.bundled import is_recipe
from drafttrain.core.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(name="eval")(evaluate)


def evaluate(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE | DRAFTER [SECTION.KEY=VALUE]...",
            help="A recipe or its run folder; or a drafter: a folder, a hub id, builtin:drafter. Overrides of a "
            "drafter: eval.key=value, target.key=value, plugins=[module].",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="MODEL",
            help="The target of the drafter. Default: the one that it was trained for.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for eval.json and report.html of a drafter. Default: the drafter's.",
            show_default=False,
        ),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Evaluate an exported drafter: tables on stdout, eval.json beside the drafter."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(what)
        from drafttrain.commands.evaluate import evaluate_drafter, evaluate_recipe

        if len(named) == 1 and target is None and out is None and is_recipe(named[0]):
            loaded, run_folder = recipe_and_run_folder(named[0], overrides, smoke=smoke, runs=runs)
            evaluate_recipe(loaded, run_folder)
            return
        _check_drafter(named, smoke=smoke)
        evaluate_drafter(named[0], target, overrides, out=out)


def _check_drafter(named: list[str], *, smoke: bool) -> None:
    problems = []
    if smoke:
        problems.append("--smoke shrinks a recipe and has no effect on a drafter: remove it")
    if not named:
        problems.append("give a recipe or a drafter")
    if len(named) > 1:
        problems.append(f"give one recipe or drafter, got {len(named)} names; drafttrain compare compares drafters")
    problems += [
        f"{name}: a recipe is evaluated alone, without --target and --out" for name in named if is_recipe(name)
    ]
    if problems:
        raise RecipeError("arguments", problems)
