"""The application, and what its commands share: options, exit codes, the recipe and its run folder."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from drafttrain import __version__
from drafttrain.core.console import complain, say, stderr
from drafttrain.core.errors import DrafttrainError, Interrupted, RecipeError
from drafttrain.distributed.world import is_first, world

if TYPE_CHECKING:
    from drafttrain.config.recipe import Recipe

OVERRIDE = re.compile(r"^[A-Za-z_][\w-]*(\.[\w-]+)*=")
RUNS = Path("runs")

app = typer.Typer(
    name="drafttrain",
    help="Train the drafters of speculative decoding, export them, and measure what they yield.\n\n"
    "One YAML recipe describes a run. Start with: drafttrain fit demo",
    epilog="Exit codes: 0 done, 1 failed, 2 recipe or arguments wrong, 3 gate not met, "
    "75 interrupted: run the same command to continue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipeOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, the name of a bundled recipe, or a run folder.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Values that replace those of the recipe: train.lr=3e-4 data.sources.0.path=logs.jsonl",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="MODEL",
        help="The drafter's target. Default: the one it was trained for.",
        show_default=False,
    ),
]
KeyVariable = Annotated[
    str | None,
    typer.Option(
        "--api-key-variable",
        metavar="NAME",
        help="Environment variable that holds the server's key.",
        show_default=False,
    ),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink the recipe to 20 steps through every stage.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the run folders.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"drafttrain {__version__}")
        raise typer.Exit


@app.callback()
def drafttrain(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Turn an error that a user can cause into a message and its exit code, and a request to stop into 75."""
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except DrafttrainError as error:
        if debug:
            stderr.print_exception()
        if not isinstance(error, RecipeError) or _is_first_here():
            complain(str(error))
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if debug:
            stderr.print_exception()
        # A name that is too long is itself the error.
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        raise typer.Exit(DrafttrainError.exit_code) from error
    except KeyboardInterrupt as error:
        say("interrupted: run the same command to continue")
        raise typer.Exit(Interrupted.exit_code) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_first_here() -> bool:
    """Return whether this is the first process of its machine: a recipe is wrong for all of them, a missing file for one machine."""
    try:
        return world().local_rank == 0
    except RecipeError:  # the launcher's environment is itself what is wrong
        return True


def only_first_process() -> None:
    """Exit with 0 in every process but the first of those that a launcher started."""
    if not is_first():
        raise typer.Exit(0)


def existing_folder(given: Path) -> Path:
    """Return a folder that an argument names.

    Raises:
        RecipeError: It does not exist.
    """
    if not given.is_dir():
        raise RecipeError("arguments", [f"{given}: no such folder"])
    return given


def names_and_overrides(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Return the words that name something, and those that override a value."""
    words = words or []
    return [word for word in words if not OVERRIDE.match(word)], [word for word in words if OVERRIDE.match(word)]


def not_one_drafter(named: list[str]) -> list[str]:
    """Return what is wrong with the names of a command that takes one drafter."""
    return [] if len(named) == 1 else [f"give one drafter, got {len(named)} names"]


def recipe_and_run_folder(name: str, overrides: list[str] | None, *, smoke: bool, runs: Path) -> tuple["Recipe", Path]:
    """Return the recipe and its run folder: the named one if it is a run folder and not renamed, else `runs/<name>`."""
    from drafttrain.config.load import load_recipe

    recipe = load_recipe(name, overrides or [], smoke=smoke)
    renamed = smoke or any(override.startswith("name=") for override in overrides or [])
    return recipe, Path(name) if Path(name).is_dir() and not renamed else runs / recipe.name


def _stop(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does: no handler of ordinary errors may catch it."""
    raise KeyboardInterrupt
