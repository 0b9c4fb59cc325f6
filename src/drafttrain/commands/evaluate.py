"""drafttrain eval and compare: the exported files of a run, or drafters by their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from drafttrain.commands.fit import fit
from drafttrain.commands.made_models import with_made_models
from drafttrain.commands.named_drafters import evaluated_on, folders_of
from drafttrain.commands.named_prompts import prompts_named_twice
from drafttrain.config.load import load_sections
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.eval.report import write_report
from drafttrain.eval.result import Result
from drafttrain.eval.table import show, show_compared
from drafttrain.pipeline.evaluating import evaluate_folders, with_inputs
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.inputs import evaluation_inputs, inputs_of, is_evaluated_on
from drafttrain.pipeline.judging import commands_of
from drafttrain.pipeline.kinds import kind_of_run
from drafttrain.pipeline.preflight import check_drafters, check_parts
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.target_model import Target


def evaluate_recipe(recipe: Recipe, folder: Path) -> Result:
    """Evaluate the exported files of a run, compared with its start, and write eval.json and report.html."""
    here, kind = RunFolder(folder), kind_of_run(recipe)
    here.exported(kind.what)
    held = here.stored_recipe()
    if held is None:
        raise CheckpointError(f"{folder}: no exported {kind.what} here yet. Run drafttrain fit first")
    recipe = with_made_models(recipe, folder.parent, fit=fit)
    check_parts(recipe, data=False)
    # The files were exported with the settings of the run, so a change of the export settings does not matter here.
    run = kind(replace(recipe, export=held.export), folder, opening="evaluate")
    result = run.evaluate()
    result = with_inputs(result, inputs_of(run.recipe, only=is_evaluated_on))
    written = write_evaluation(run.folder.path, result, title=recipe.name)
    show(result)
    say(f"written: {written}")
    return result


def evaluate_drafter(drafter: str, target: str | None, overrides: Sequence[str], *, out: Path | None = None) -> None:
    """Evaluate one drafter: a local folder, a hub id or a builtin one.

    Args:
        target: The target; None: the drafter's own.
        overrides: Overrides of the sections target and eval.
        out: Folder of eval.json and report.html; None: the drafter's folder, if it is local.
    """
    say(f"drafter: {drafter}")
    out = out or (Path(drafter) if Path(drafter).is_dir() else None)
    result = evaluate_named({"drafter": drafter}, target, overrides, out=out)
    show(result)
    if out is None:
        say("eval.json and report.html: not written: give --out DIR")
        return
    say(f"written: {write_evaluation(out, result, title=Path(drafter).name)}")


def compare_drafters(
    drafters: Sequence[str],
    target: str | None,
    overrides: Sequence[str],
    *,
    prompts: str | None,
    out: Path,
    answers: Path | None,
) -> None:
    """Compare drafters, named A, B, C and so on, with each other and with the proposers of eval.beside.

    Args:
        target: The target; None: the first drafter's own.
        overrides: Overrides of the sections target and eval.
        prompts: A file of prompts; None: `eval.prompts`.
        out: Folder of eval.json and report.html.
        answers: Folder for the answers as Spec-Bench's files; None: they are not written.

    Raises:
        RecipeError: There is no drafter, or more than there are letters; one is named twice; two settings name prompts.
    """
    problems = [f"{one}: named twice" for one in dict.fromkeys(drafters) if drafters.count(one) > 1]
    if not 1 <= len(drafters) <= len(ascii_uppercase):
        problems.append(f"give 1 to {len(ascii_uppercase)} drafters, got {len(drafters)}")
    problems += prompts_named_twice(prompts, overrides)
    if problems:
        raise RecipeError("arguments", problems)
    named = dict(zip(ascii_uppercase, drafters, strict=False))
    for letter, drafter in named.items():
        say(f"{letter}: {drafter}")
    of_prompts = [] if prompts is None else [f"eval.prompts={prompts}"]
    result = evaluate_named(named, target, [*overrides, *of_prompts], out=out, answers=answers)
    show_compared(result)
    title = ", ".join(f"{letter}: {drafter}" for letter, drafter in named.items())
    say(f"written: {write_evaluation(out, result, title=title)}{'' if answers is None else f', {answers}'}")


def evaluate_named(
    drafters: Mapping[str, str],
    target: str | None,
    overrides: Sequence[str],
    *,
    out: Path | None,
    answers: Path | None = None,
) -> Result:
    """Evaluate drafters by name on the same prompts.

    Args:
        drafters: By name in the result: folders, hub ids or builtin drafters.
        target: The target; None: the first drafter's own.
        overrides: Overrides of the sections target and eval.
        out: Folder that eval.json and report.html will be in; None: none. Unfinished outputs are stored there.
        answers: Folder for the answers as Spec-Bench's files; None: they are not written.

    Raises:
        RecipeError: A drafter, or an override, is wrong.
        CheckpointError: A drafter does not fit the target.
    """
    quiet_libraries()
    of_target, settings = load_sections(["target", "eval"], overrides)
    named = dict(zip(drafters, folders_of(list(drafters.values())), strict=True))
    (spelled, first), *_ = zip(drafters.values(), named.values(), strict=True)
    of_target = evaluated_on(of_target, first, named=spelled, target=target, overrides=overrides)
    check_drafters(of_target, [str(one) for one in named.values()])
    loaded = Target.load(of_target)
    unfinished = out / "eval.unfinished" if out else None
    result = evaluate_folders(named, loaded, settings, dropped=(), unfinished=unfinished, answers=answers)
    return with_inputs(result, evaluation_inputs(replace(of_target, model=loaded.name), settings))


def write_evaluation(out: Path, result: Result, *, title: str) -> str:
    """Write eval.json and report.html; return their paths in one line."""
    out.mkdir(parents=True, exist_ok=True)
    result.write(out / "eval.json")
    write_report(out, result, title=title, command=commands_of(out))
    return f"{out / 'eval.json'}, {out / 'report.html'}"
