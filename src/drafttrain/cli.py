"""The command line: arguments in, exit code out. What a command does is in `drafttrain.pipeline` and `drafttrain.config`."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from drafttrain.core.console import say, stderr, table
from drafttrain.core.errors import DrafttrainError, Interrupted, RecipeError

if TYPE_CHECKING:
    from drafttrain.config.recipe import Recipe

app = typer.Typer(
    name="drafttrain",
    help="Train the drafters of speculative decoding, export them, and prove what they yield.\n\n"
    "One YAML recipe describes a run. Start with: drafttrain fit demo",
    epilog="Exit codes: 0 done, 1 failed, 2 recipe or arguments wrong, 3 gate not met, "
    "75 interrupted: run the same command to continue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipe_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

RecipeOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, the name of a bundled recipe, or a run folder.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Values that replace the recipe's: train.lr=3e-4 data.sources.0.path=logs.jsonl",
        show_default=False,
    ),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink the recipe to some 20 steps through every stage.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RUNS = Path("runs")
OVERRIDE = re.compile(r"^[A-Za-z_][\w-]*(\.[\w-]+)*=")


@app.command()
def fit(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Do all of a recipe: generate data, train, export, evaluate. Run again, it continues; what is done is skipped."""
    with exit_codes(debug=debug):
        loaded, run_folder = _recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        from drafttrain import launch, pipeline

        if (count := launch.processes_wanted(loaded)) > 1:
            raise typer.Exit(launch.relaunch(count))
        pipeline.fit(loaded, run_folder)


@app.command()
def gen(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Only generate the data of a recipe with its target."""
    with exit_codes(debug=debug):
        loaded, run_folder = _recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        from drafttrain import launch, pipeline

        if (count := launch.processes_wanted(loaded)) > 1:
            raise typer.Exit(launch.relaunch(count))
        pipeline.gen(loaded, run_folder)


@app.command()
def online(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [SECTION.KEY=VALUE]... | status RUN | rollback RUN [ROUTE]",
            help="A recipe with a section online; or how far a run is; or the version before the one that is served.",
            show_default=False,
        ),
    ],
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Learn from serving logs as they grow, and publish what is better, until it is told to stop; run again, it continues."""
    with exit_codes(debug=debug):
        word, *rest = what
        if word in ("status", "rollback"):
            if not 1 <= len(rest) <= (2 if word == "rollback" else 1):
                raise RecipeError("arguments", [f"drafttrain online {word} RUN: give a run folder"])
            from drafttrain import online_stages, pipeline

            if word == "status":
                online_stages.show_status(Path(rest[0]))
            else:
                pipeline.rollback(Path(rest[0]), route=rest[1] if len(rest) > 1 else None)
            return
        loaded, run_folder = _recipe_and_run_folder(word, rest, smoke=smoke, runs=runs)
        from drafttrain import pipeline

        pipeline.online(loaded, run_folder)


@app.command()
def export(
    recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, runs: Runs = RUNS, debug: Debug = False
) -> None:
    """Write the drafter folder of a trained run, evaluate its files, and hold them against the gate."""
    with exit_codes(debug=debug):
        loaded, run_folder = _recipe_and_run_folder(recipe, overrides, smoke=smoke, runs=runs)
        from drafttrain import pipeline

        pipeline.export(loaded, run_folder)


@app.command(name="eval")
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE | DRAFTER [DRAFTER] [SECTION.KEY=VALUE]...",
            help="A recipe or its run folder; or one drafter (a folder, a hub id, builtin:drafter), or two to compare "
            "pairwise. Then overrides; of drafters: eval.key=value and target.key=value.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None, typer.Option("--target", metavar="MODEL", help="The target of drafters.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where eval.json and report.html of drafters go; left out: the first one's folder.",
            show_default=False,
        ),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Evaluate exported drafters: a table on stdout, JSON beside it."""
    with exit_codes(debug=debug):
        from drafttrain.config.bundled import is_recipe

        named = [word for word in what if not OVERRIDE.match(word)]
        overrides = [word for word in what if OVERRIDE.match(word)]
        if len(named) == 1 and target is None and out is None and is_recipe(named[0]):
            loaded, run_folder = _recipe_and_run_folder(named[0], overrides, smoke=smoke, runs=runs)
            from drafttrain import pipeline

            pipeline.evaluate_recipe(loaded, run_folder)
            return
        _check_drafters(named, smoke=smoke)
        from drafttrain import pipeline

        pipeline.evaluate_drafters(named, target, overrides, out=out)


@recipe_app.command(name="list")
def list_recipes() -> None:
    """List the recipes that come with drafttrain."""
    from drafttrain.config.bundled import bundled_folder, bundled_recipes

    table([[one.name, one.title] for one in bundled_recipes()], columns=["recipe", "what it trains"])
    say(f"in {bundled_folder()}")


@recipe_app.command()
def show(recipe: RecipeOrFolder, overrides: Overrides = None, smoke: Smoke = False, debug: Debug = False) -> None:
    """Print a recipe with every default visible and every key explained."""
    with exit_codes(debug=debug):
        from drafttrain.config.dump import dump_recipe
        from drafttrain.config.load import load_recipe

        typer.echo(dump_recipe(load_recipe(recipe, overrides or [], smoke=smoke), comments=True), nl=False)


@recipe_app.command()
def copy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a bundled recipe.", show_default=False)],
    to: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to; left out: here.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Copy a bundled recipe, comments and all, to change it."""
    with exit_codes(debug=debug):
        from drafttrain.config.bundled import copy_recipe

        say(f"written: {copy_recipe(recipe, to)}")


@recipe_app.command()
def check(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="YAML files, or names of bundled recipes.")],
    debug: Debug = False,
) -> None:
    """Check recipes without loading a model: ok, or every problem with its line."""
    with exit_codes(debug=debug):
        from drafttrain.config.load import load_recipe

        wrong = 0
        for recipe in recipes:
            try:
                load_recipe(recipe)
                typer.echo(f"{recipe}: ok")
            except RecipeError as error:
                wrong += 1
                _tell(error)
        if wrong:
            raise typer.Exit(RecipeError.exit_code)


@recipe_app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from drafttrain.config.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Turn errors that a user can cause into a message and their exit code, and a request to stop into 75."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except DrafttrainError as error:
        if debug:
            stderr.print_exception()
        _tell(error)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if debug:
            stderr.print_exception()
        where = f"{error.filename}: " if error.filename else ""
        stderr.print(f"{where}{error.strerror or error}", style="red", markup=False)
        raise typer.Exit(DrafttrainError.exit_code) from error
    except KeyboardInterrupt as error:
        say("interrupted: run the same command to continue")
        raise typer.Exit(Interrupted.exit_code) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    """Run the command line; DeepSpeed's launcher adds a word of its own, which the environment says too."""
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
    app()


def _tell(error: DrafttrainError) -> None:
    """Print an error in its own words, brackets and all."""
    stderr.print(str(error), style="red", markup=False)


def _stop(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does: no handler of ordinary errors may swallow it."""
    raise KeyboardInterrupt


def _recipe_and_run_folder(name: str, overrides: list[str] | None, *, smoke: bool, runs: Path) -> tuple["Recipe", Path]:
    """Return the recipe and where its run lives: a run folder that was named (and not renamed), or `runs/<name>`."""
    from drafttrain.config.load import load_recipe

    recipe = load_recipe(name, overrides or [], smoke=smoke)
    renamed = smoke or any(override.startswith("name=") for override in overrides or [])
    return recipe, Path(name) if Path(name).is_dir() and not renamed else runs / recipe.name


def _check_drafters(named: list[str], *, smoke: bool) -> None:
    """Refuse what `eval` of drafters cannot mean."""
    from drafttrain.config.bundled import is_recipe

    problems = []
    if smoke:
        problems.append("--smoke shrinks a recipe: it means nothing for drafters")
    if not 1 <= len(named) <= 2:
        problems.append(f"a recipe, one drafter or two are wanted, got {len(named)}")
    problems += [
        f"{name}: a recipe is evaluated alone, without --target and --out" for name in named if is_recipe(name)
    ]
    if problems:
        raise RecipeError("arguments", problems)


if __name__ == "__main__":
    main()
