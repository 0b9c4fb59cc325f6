"""`calibrate`: a confidence of draft tokens as a chance of acceptance."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, Target, exit_codes, names_and_overrides, only_first_process
from drafttrain.core.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(calibrate)


def calibrate(
    drafter: Annotated[
        list[str],
        typer.Argument(
            metavar="DRAFTER [SECTION.KEY=VALUE]...",
            help="A drafter folder, a run folder, a hub id or builtin:drafter. 'eval.length={kind: predicted_acceptance}' chooses the "
            "confidence; the default is kind confidence. Other overrides: eval.key=value, target.key=value.",
            show_default=False,
        ),
    ],
    target: Target = None,
    method: Annotated[
        str, typer.Option("--method", help="The map that is written: isotonic, temperature or platt. All are compared.")
    ] = "isotonic",
    temperature: Annotated[
        float, typer.Option("--temperature", help="Temperature of the decoding: acceptance depends on it.")
    ] = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The file. Default: calibration.json in the drafter's folder, if it is local.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Fit how likely a draft token is accepted at each confidence; print ECE and Brier score on other prompts."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(drafter)
        problems = [] if len(named) == 1 else [f"give one drafter, got {len(named)} names"]
        if not 0 <= temperature < float("inf"):
            problems.append(f"--temperature: a number of 0 or more, got {temperature:g}")
        if problems:
            raise RecipeError("arguments", problems)
        from drafttrain.commands.calibrate import calibrate as fit

        fit(named[0], target, overrides, method=method, temperature=temperature, out=out)
