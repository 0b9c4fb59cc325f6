"""`compare`: any number of drafters on the same prompts."""

from pathlib import Path
from typing import Annotated

import typer

from drafttrain.cli.app import RUNS, Debug, Target, exit_codes, names_and_overrides, only_first_process

OUT = RUNS / "compare"


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(compare)


def compare(
    drafters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DRAFTER... [SECTION.KEY=VALUE]...",
            help="Folders, hub ids or builtin:drafter, named A, B, C ... Overrides: eval.key=value, target.key=value. "
            "'eval.beside=[{kind: ngram}]' adds proposers that need no training.",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts: question.jsonl of Spec-Bench or MT-bench, HumanEval, GSM8K, your own (docs/data.md). "
            "Default: eval.prompts.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of eval.json and report.html.")] = OUT,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            metavar="DIR",
            help="Also write every output as an answer file of Spec-Bench, which its speed.py reads.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare drafters on the same prompts: one table, every pair with p-values, slices; eval.json and report.html."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(drafters)
        from drafttrain.commands.compare import compare_drafters

        compare_drafters(named, target, overrides, prompts=prompts, out=out, answers=answers)
