"""`import`, `extract` and `serve-config`: drafters of other trainers, parts of nested ones, and how a drafter is served."""

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, Target, existing_folder, exit_codes


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(name="import")(import_drafter)
    app.command()(extract)
    app.command(name="serve-config")(serve_config)


def import_drafter(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="EAGLE-3, EAGLE-1, Medusa, speculators, or a plain causal LM.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="MODEL", help="Its target. Default: the one that its files name.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The drafter folder. Default: FOLDER.drafter.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Convert a drafter of another trainer into a drafter folder, to train, evaluate or export it."""
    with exit_codes(debug=debug):
        _commands().import_drafter.import_drafter(existing_folder(folder), target=target, out=out)


def extract(
    drafter: Annotated[
        str,
        typer.Argument(
            metavar="DRAFTER", help="A drafter folder of kind sorted_lm, matformer or causal_lm.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new drafter folder.", show_default=False)],
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="N", help="Its first layers. Default: all.", show_default=False)
    ] = None,
    ffn: Annotated[
        list[int] | None,
        typer.Option(
            "--ffn",
            metavar="M",
            help="The first feed-forward neurons of every layer; given several times: of each layer. Default: all.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a sub-model of a nested drafter as a drafter of kind causal_lm, which every format holds."""
    with exit_codes(debug=debug):
        _commands().extract.extract(str(existing_folder(Path(drafter))), out, num_layers=layers, widths=ffn or None)


def serve_config(
    drafter: Annotated[
        Path,
        typer.Argument(metavar="DRAFTER", help="An evaluated drafter folder, or its run folder.", show_default=False),
    ],
    engine: Annotated[str, typer.Option("--engine", metavar="ENGINE", help="The serving engine.")] = "vllm",
    target: Target = None,
    debug: Debug = False,
) -> None:
    """Print the command that serves a drafter, with the draft length that its evaluation found best."""
    with exit_codes(debug=debug):
        typer.echo(_commands().serve_config.serve_command(existing_folder(drafter), engine, target=target))


def _commands() -> SimpleNamespace:
    """Return the modules of these commands, which need torch."""
    from drafttrain.commands import extract, import_drafter, serve_config

    return SimpleNamespace(extract=extract, import_drafter=import_drafter, serve_config=serve_config)
