"""`advise`: which draft length pays on which GPU."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, Target, exit_codes, names_and_overrides, not_one_drafter
from drafttrain.core.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command(name="advise")(ask)


def ask(
    drafter: Annotated[
        list[str],
        typer.Argument(
            metavar="DRAFTER [SECTION.KEY=VALUE]...",
            help="A drafter folder, a run folder, a hub id or builtin:drafter. Overrides: eval.key=value, target.key=value.",
            show_default=False,
        ),
    ],
    target: Target = None,
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            metavar="NAMES",
            help="h100,a100-80gb,l4 ...; here: this machine, calibrated. A wrong name lists all.",
        ),
    ] = "h100",
    batch: Annotated[str, typer.Option("--batch", metavar="SIZES", help="Sequences decoded together.")] = "1,8,32",
    context: Annotated[
        str, typer.Option("--context", metavar="SIZES", help="Cached tokens of each sequence; 2k is 2048.")
    ] = "2k,32k",
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Type of weights and caches on a named GPU: bfloat16, float16, float32, float8."),
    ] = "bfloat16",
    bandwidth_share: Annotated[
        float, typer.Option("--bandwidth-share", help="Share of a named GPU's bandwidth that is assumed.")
    ] = 0.7,
    peak_share: Annotated[
        float, typer.Option("--peak-share", help="Share of a named GPU's peak that is assumed.")
    ] = 0.5,
    launch_us: Annotated[
        float,
        typer.Option("--launch-us", help="Microseconds to launch a layer: 8 with CUDA graphs, about 60 without."),
    ] = 8.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for advice.json, advice.png and report.html. Default: the drafter's, if it is local.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Predict a drafter's speed-up by batch and context, the best draft length, and where drafting stops paying.

    Acceptance is measured here (eval.json of the drafter, or a small evaluation); times are those of the GPU's data sheet.
    """
    with exit_codes(debug=debug):
        named, overrides = names_and_overrides(drafter)
        problems = not_one_drafter(named)
        batches, contexts = _sizes("--batch", batch, problems), _sizes("--context", context, problems, least=0)
        if problems:
            raise RecipeError("arguments", problems)
        from drafttrain.commands.advise import Question, advise

        gpus = [name for name in gpu.split(",") if name]
        given = (named[0], target, gpus, batches, contexts, dtype, overrides)
        advise(Question(*given, bandwidth_share, peak_share, launch_us), out=out)


def _sizes(option: str, text: str, problems: list[str], *, least: int = 1) -> list[int]:
    """Return the sizes of an option such as `1,8` or `2k,32k`; a wrong one is added to the problems."""
    sizes = []
    for part in text.split(","):
        number, factor = (part[:-1], 1024) if part.lower().endswith("k") else (part, 1)
        if number.strip().isdigit() and int(number) * factor >= least:
            sizes.append(int(number) * factor)
        else:
            problems.append(f"{option}: must be whole numbers of {least} or more, such as 8 or 2k, got {part!r}")
    return sizes
