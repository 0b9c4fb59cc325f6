"""`eval` and `compare`: exported drafters on their target. `cascade`: a small model that writes a part of the text."""

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from drafttrain.cli.app import (
    RUNS,
    Debug,
    Runs,
    Smoke,
    Target,
    exit_codes,
    names_and_overrides,
    only_first_process,
    recipe_and_run_folder,
)
from drafttrain.config.bundled import is_recipe
from drafttrain.core.errors import RecipeError

COMPARED = RUNS / "compare"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(name="eval")(evaluate)
    app.command()(compare)
    app.command()(cascade)


def evaluate(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE | DRAFTER [SECTION.KEY=VALUE]...",
            help="A recipe or its run folder; or a drafter: a folder, a hub id, builtin:drafter. Overrides of a "
            "drafter: eval.key=value, target.key=value, plugins=[module].",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="MODEL",
            help="The target of the drafter. Default: the one that it was trained for.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for eval.json and report.html of a drafter. Default: the drafter's.",
            show_default=False,
        ),
    ] = None,
    smoke: Smoke = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Evaluate an exported drafter: tables on stdout, eval.json beside the drafter."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(what)
        if len(named) == 1 and target is None and out is None and is_recipe(named[0]):
            loaded, run_folder = recipe_and_run_folder(named[0], overrides, smoke=smoke, runs=runs)
            _commands()[0].evaluate_recipe(loaded, run_folder)
            return
        _check_drafter(named, smoke=smoke)
        _commands()[0].evaluate_drafter(named[0], target, overrides, out=out)


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
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of eval.json and report.html.")] = COMPARED,
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
        _commands()[0].compare_drafters(named, target, overrides, prompts=prompts, out=out, answers=answers)


def cascade(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET SMALL [SECTION.KEY=VALUE]...",
            help="The large and the small model: folders, hub ids or builtin names; the small one may be a drafter of kind causal_lm. "
            "Overrides: 'cascade.by={kind: entropy}', cascade.values=[0.5,1], eval.key=value, target.key=value.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts (docs/data.md). Default: eval.prompts."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of cascade.json and frontier.png.")] = RUNS
    / "cascade",
    debug: Debug = False,
) -> None:
    """Let a small model write a part of the text, LOSSY: quality against cost, beside both models alone and random routing."""
    with exit_codes(debug=debug):
        named, overrides = names_and_overrides(models)
        if len(named) != 2:
            raise RecipeError("arguments", [f"give a target and a small model, got {len(named)} names"])
        _, cascades = _commands()
        cascades.cascade(*named, overrides, prompts=prompts, out=out)


def _commands() -> tuple[ModuleType, ModuleType]:
    """Return the commands of evaluations, and those of cascades."""
    # At the head of the file this would load torch for `drafttrain --help`.
    from drafttrain.commands import cascade, evaluate

    return evaluate, cascade


def _check_drafter(named: list[str], *, smoke: bool) -> None:
    problems = []
    if smoke:
        problems.append("--smoke shrinks a recipe and has no effect on a drafter: remove it")
    if not named:
        problems.append("give a recipe or a drafter")
    if len(named) > 1:
        problems.append(f"give one recipe or drafter, got {len(named)} names; drafttrain compare compares drafters")
    problems += [
        f"{name}: a recipe is evaluated alone, without --target and --out" for name in named if is_recipe(name)
    ]
    if problems:
        raise RecipeError("arguments", problems)
