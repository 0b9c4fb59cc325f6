"""`chat`: questions to a target, answered with a drafter."""

import signal
from typing import Annotated

import typer

from drafttrain.cli.app import Debug, Target, exit_codes


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(chat)


def chat(
    drafter: Annotated[
        str,
        typer.Argument(
            metavar="DRAFTER",
            help="A drafter folder, a run folder, a hub id, or builtin:NAME.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Questions, each a chat of its own. Without any: an interactive chat; stdin, if it is not a terminal, "
            "has a question a line.",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            help="Most tokens of an answer. Default: 256, and 128 with --measure.",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            "--length",
            metavar="POLICY",
            help="How much to draft: fixed, tree, or a mapping as under eval.length of a recipe. Default: of the lengths in "
            "the drafter's eval.json the one that is fastest here, else chains of 5.",
            show_default=False,
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            "--draft-tokens",
            metavar="N",
            help="Draft tokens per round: of a chain, or of the tree with --length tree.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="As target.dtype of a recipe.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt.", show_default=False)
    ] = None,
    marks: Annotated[
        bool, typer.Option("--marks/--no-marks", help="Mark accepted draft tokens in the answers.")
    ] = True,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Only measure the speed with and without the drafter, on PROMPTs or 12 built-in questions.",
        ),
    ] = False,
    within: Annotated[
        float | None,
        typer.Option(
            "--within",
            metavar="SECONDS",
            min=0,
            help="With --measure: begin no further question after this time, once there are four. Default: all questions.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Chat with a target whose answers a drafter speeds up; accepted draft tokens are coloured."""
    with exit_codes(debug=debug):
        # A chat has nothing to save: SIGTERM ends it, while Ctrl-C ends an answer.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from drafttrain.commands import chat as command

        opened = command.open_drafter(
            drafter,
            target,
            command.overrides(
                temperature=temperature,
                max_new_tokens=max_new_tokens or (128 if measure else 256),
                length=length,
                draft_tokens=draft_tokens,
                dtype=dtype,
            ),
        )
        if measure:
            command.measure_speed(opened, prompts or [], system=system, within_seconds=within)
        elif prompts:
            command.answer(opened, prompts, system=system, marks=marks)
        else:
            command.interactive(opened, system=system, marks=marks)
