"""`fit`, `gen`, `export`: the stages of a recipe, together or alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drafttrain.cli.app import (
    RUNS,
    Debug,
    Overrides,
    RecipeOrFolder,
    Runs,
    Smoke,
    Target,
    exit_codes,
    only_first_process,
    recipe_and_run_folder,
)
from drafttrain.config.bundled import is_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.distributed.launch import processes_wanted, relaunch

if TYPE_CHECKING:
    from drafttrain.config.recipe import Recipe


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(fit)
    app.command()(gen)
    app.command()(export)


def _run_stage(name: str, recipe: str, overrides: list[str] | None, *, smoke: bool, runs: Path, debug: bool) -> None:
    with exit_codes(debug=debug):
        loaded, run_folder = recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        _start_processes(loaded)
        from drafttrain.commands import fit, gen

        {"fit": fit.fit, "gen": gen.gen}[name](loaded, run_folder)


def fit(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Run all stages: generate data, train, export, evaluate. Finished stages are skipped, an interrupted one continues."""
    _run_stage("fit", recipe, overrides, smoke=smoke, runs=runs, debug=debug)


def gen(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Only generate the data of a recipe with its target."""
    _run_stage("gen", recipe, overrides, smoke=smoke, runs=runs, debug=debug)


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE | DRAFTER",
            help="A recipe or its run folder. With --to also a drafter folder.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="Write this format beside the drafter folder: hf, vllm, speculators, sglang, gguf, openvino.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Decode with an engine that reads the format; compare its tokens and counters."),
    ] = False,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed", help="With --verify: also measure the engine's tokens/s with the drafter and without, in turns."
        ),
    ] = False,
    target: Target = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where to write the format. Default: DRAFTER.FORMAT.", show_default=False
        ),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Export a trained run, evaluate the files and check them against the gate; with --to, write a further format."""
    with exit_codes(debug=debug):
        only_first_process()
        _check_export(what, to or [], verify=verify, speed=speed, target=target, out=out)
        from drafttrain.commands.export import convert_drafter, convert_run, export_run

        if to and not is_recipe(what):
            convert_drafter(what, to, overrides or [], target=target, verify=verify, speed=speed, out=out)
            return
        loaded, run_folder = recipe_and_run_folder(what, overrides, smoke=smoke, runs=runs)
        if to:
            convert_run(loaded, run_folder, to, verify=verify, speed=speed, out=out)
        else:
            export_run(loaded, run_folder)


def _start_processes(recipe: "Recipe") -> None:
    """Start several processes where the recipe wants them, and exit as they do."""
    if (count := processes_wanted(recipe)) > 1:
        raise typer.Exit(relaunch(count, max_restarts=recipe.train.max_restarts))


def _check_export(what: str, to: list[str], *, verify: bool, speed: bool, target: str | None, out: Path | None) -> None:
    problems = []
    if not to and (verify or target or out):
        problems.append("--verify, --target and --out are for a format: add --to FORMAT")
    if speed and not verify:
        problems.append("--speed measures the engines that --verify runs: add --verify")
    if to and out and len(to) > 1:
        problems.append("--out takes one format: use --to once")
    if is_recipe(what) and target:
        problems.append(f"{what}: a recipe names its target itself: remove --target")
    if problems:
        raise RecipeError("arguments", problems)
