"""`check-server`: the counters of a live server against the evaluation of the drafter that it serves."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, KeyVariable, Target, exit_codes, names_and_overrides, only_first_process
from drafttrain.core.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(name="check-server")(check_server)


def check_server(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[DRAFTER] URL [SECTION.KEY=VALUE]...",
            help="The drafter that is served, or its run folder; the server's address; overrides of target.* and eval.*. "
            "Without a drafter the counters are printed alone.",
            show_default=False,
        ),
    ],
    engine: Annotated[str, typer.Option("--engine", metavar="ENGINE", help="The engine behind the address.")] = "vllm",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="The target as the server calls it. Default: found by its folder or name.",
            show_default=False,
        ),
    ] = None,
    api_key_variable: KeyVariable = None,
    target: Target = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder for server.json. Default: the drafter's.", show_default=False
        ),
    ] = None,
    require: Annotated[
        bool, typer.Option("--require", help="Exit with 3 if the server accepts less than the evaluation predicted.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Send the evaluation's prompts to a live server and compare its counters with the evaluation. Loads no model."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(what)
        _check(named)
        from drafttrain.commands.check_server import ServerAccess, evaluate_server

        *drafters, url = named
        evaluate_server(
            Path(drafters[0]) if drafters else None,
            ServerAccess(url, engine, model, api_key_variable),
            overrides,
            target=target,
            out=out,
            require=require,
        )


def _check(named: list[str]) -> None:
    if not 1 <= len(named) <= 2:
        raise RecipeError("arguments", [f"give a drafter and the server's address, got {len(named)} names"])
    *drafters, url = named
    problems = [f"{name}: no such folder" for name in drafters if not Path(name).is_dir()]
    # A password in an address must not be printed.
    if "@" in url or "?" in url:
        problems.append("the address holds a name or a key: pass the key with --api-key-variable NAME")
    elif not url.startswith(("http://", "https://")):
        problems.append(f"the address must begin with http:// or https://, got {url!r}")
    if problems:
        raise RecipeError("arguments", problems)
