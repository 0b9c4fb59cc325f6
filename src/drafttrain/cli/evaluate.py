"""Exported drafters on their target: `eval`, `compare`, `calibrate`, `long-prompt`; `cascade`, a small model that writes a part of the text; `stop-exit`."""

from pathlib import Path
from types import SimpleNamespace
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
    not_one_drafter,
    only_first_process,
    recipe_and_run_folder,
)
from drafttrain.commands.named_prompts import prompts_named_twice
from drafttrain.config.bundled import is_recipe
from drafttrain.core.errors import RecipeError

COMPARED = RUNS / "compare"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(name="eval")(evaluate)
    app.command()(compare)
    app.command()(calibrate)
    app.command()(cascade)
    app.command(name="long-prompt")(long_prompt)
    app.command(name="stop-exit")(stop_exit)


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
            _commands().evaluate.evaluate_recipe(loaded, run_folder)
            return
        _check_drafter(named, smoke=smoke)
        _commands().evaluate.evaluate_drafter(named[0], target, overrides, out=out)


def compare(
    drafters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DRAFTER... [SECTION.KEY=VALUE]...",
            help="Folders, runs, hub ids or builtin:drafter, named A, B, C ... Overrides: eval.key=value, target.key=value. "
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
        _commands().evaluate.compare_drafters(named, target, overrides, prompts=prompts, out=out, answers=answers)


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
    own: Annotated[
        bool,
        typer.Option(
            "--own",
            help="Choose again, for this target, what its kind chooses after training, and write it into the drafter's folder: thresholds of "
            "exits (sorted_lm), a tree (medusa), temperatures (dspark).",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Fit how likely a draft token is accepted at each confidence; print ECE and Brier score on other prompts."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(drafter)
        problems = not_one_drafter(named)
        if not 0 <= temperature < float("inf"):
            problems.append(f"--temperature: a number of 0 or more, got {temperature:g}")
        if own and (out is not None or method != "isotonic"):
            problems.append("--own: --out and --method belong to the map of a confidence: remove them")
        if problems:
            raise RecipeError("arguments", problems)
        if own:
            _commands().calibrate_own.calibrate_own(named[0], target, overrides, temperature=temperature)
            return
        _commands().calibrate.calibrate(named[0], target, overrides, method=method, temperature=temperature, out=out)


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
        only_first_process()
        named, overrides = names_and_overrides(models)
        if len(named) != 2:
            raise RecipeError("arguments", [f"give a target and a small model, got {len(named)} names"])
        _commands().cascade.cascade(*named, overrides, prompts=prompts, out=out)


def long_prompt(
    drafter: Annotated[
        list[str],
        typer.Argument(
            metavar="DRAFTER [SECTION.KEY=VALUE]...",
            help="A language model that drafts: a folder, a hub id or builtin:drafter. Overrides: eval.key=value, target.key=value, "
            "'long_prompt.choices=[{kind: speckv}]' (docs/long_prompts.md).",
            show_default=False,
        ),
    ],
    keep: Annotated[
        str, typer.Option("--keep", metavar="AMOUNTS", help="Of each prompt: tokens, such as 256,1024, or shares.")
    ] = "12%,25%,50%,75%,100%",
    target: Target = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts, read whole. Default: eval.prompts."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of long_prompt.json and long_prompt.png.")
    ] = RUNS / "long-prompt",
    debug: Debug = False,
) -> None:
    """Measure what the target loses if it keeps only the part of a prompt that a drafter chooses (SpecKV, SpecPC). LOSSY."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(drafter)
        problems = [*not_one_drafter(named), *prompts_named_twice(prompts, overrides)]
        numbers = _amounts(keep, problems)
        if problems:
            raise RecipeError("arguments", problems)
        command = _commands().long_prompt
        amounts = [command.Amount(tokens=tokens, share=share) for tokens, share in numbers]
        command.measure_long_prompts(named[0], target, overrides, amounts=amounts, prompts=prompts, out=out)


def stop_exit(
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET [SECTION.KEY=VALUE]...",
            help="A target: a folder, a hub id, builtin:target. Overrides: stop_exit.texts=FILE, 'stop_exit.exit=[0.5,0.9]', "
            "stop_exit.key=value, target.key=value (docs/stop_exit.md).",
            show_default=False,
        ),
    ],
    controller: Annotated[
        Path | None,
        typer.Option(
            "--controller", metavar="DIR", help="Measure this controller. Default: train one.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of stop_exit.json, stop_exit.png and controller/.")
    ] = RUNS / "stop-exit",
    debug: Debug = False,
) -> None:
    """Train a controller that exits early or stops a code completion, LOSSY: accepted lines against layers run."""
    with exit_codes(debug=debug):
        only_first_process()
        named, overrides = names_and_overrides(target)
        if len(named) != 1:
            raise RecipeError("arguments", [f"give one target, got {len(named)} names"])
        _commands().stop_exit.stop_exit(named[0], overrides, controller=controller, out=out)


def _amounts(text: str, problems: list[str]) -> list[tuple[int | None, float | None]]:
    """Return (tokens, None) or (None, share) for each amount of `256,50%`; wrong ones are added to the problems."""
    found: list[tuple[int | None, float | None]] = []
    for word in text.split(","):
        digits, percent, rest = word.strip().partition("%")
        if not digits.isdecimal() or rest or not 0 < int(digits) <= (100 if percent else int(digits)):
            problems.append(f"--keep: tokens above 0, such as 256, or shares up to 100%, got {word!r}")
        else:
            found.append((None, int(digits) / 100) if percent else (int(digits), None))
    if len(set(found)) < len(found):
        problems.append(f"--keep: each amount once, got {text!r}")
    return found


def _commands() -> SimpleNamespace:
    # At the head of the file this would load torch for `drafttrain --help`.
    from drafttrain.commands import calibrate, calibrate_own, cascade, evaluate, long_prompt, stop_exit

    commands = (calibrate, calibrate_own, cascade, evaluate, long_prompt, stop_exit)
    return SimpleNamespace(**{command.__name__.rpartition(".")[2]: command for command in commands})


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
