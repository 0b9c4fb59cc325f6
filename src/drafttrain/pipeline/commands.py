"""What the command line asks for; each command does the stages that it needs."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drafttrain.config.dump import dump_recipe
from drafttrain.config.load import load_recipe, load_sections
from drafttrain.config.made_by import MADE_BY, made_by_recipes
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import CheckpointError, DrafttrainError, RecipeError
from drafttrain.core.files import clear_leftovers, write_json
from drafttrain.distributed.collectives import first_before_others, together, wait_for_all
from drafttrain.distributed.world import is_first, launched, world
from drafttrain.pipeline.data import dropped_prompts, training_data, write_texts
from drafttrain.pipeline.drafter_folder import write_drafter
from drafttrain.pipeline.engines import Stand, check_engines, check_writer, only, write_and_verify
from drafttrain.pipeline.evaluating import evaluated, evaluated_head
from drafttrain.pipeline.exporting import command_line, export_and_judge
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.head import fit_head, labelled_tokens
from drafttrain.pipeline.inputs import inputs_of, is_evaluated_on, target_inputs
from drafttrain.pipeline.online_run import online_run, report, show_status
from drafttrain.pipeline.preflight import check_drafters, check_parts
from drafttrain.pipeline.run import Run, quiet_libraries
from drafttrain.pipeline.settled import settled
from drafttrain.pipeline.training import train_drafter


def fit(recipe: Recipe, folder: Path, *, above: Sequence[str] = ()) -> None:
    """Do all stages of a recipe; the finished ones are skipped. With a section `online`: learn once from the logs there are.

    Several processes generate, cache and train together; then the first one exports and evaluates.

    Args:
        above: Recipes that wait for what this one makes.
    """
    if recipe.online is not None:
        learn_online(recipe, folder, once=True)
        return
    check_engines(recipe.export, recipe.drafter.kind if recipe.drafter else None, where=folder)
    check_writer(recipe, RunFolder(folder).data / "generated")
    with contextlib.ExitStack() as held:
        with _all_processes(recipe, folder, held):
            made = _checked_and_made(recipe, folder, above=above)
            run = Run(made, folder, placement=recipe.train.target_placement)
            if is_first() and not run.folder.train_done.exists():
                # Figures of an export of what was there so far; a kill after the training would let them stand for its end.
                run.folder.drop_figures()
            write_texts(run)
            if run.recipe.head is not None:
                _fit_head(run)
            else:
                train_drafter(run)
        if is_first():
            run.leave_the_others()
            export_and_judge(run)


def gen(recipe: Recipe, folder: Path) -> None:
    """Generate, encode, label and cache the data of a recipe; several processes share the work."""
    check_writer(recipe, RunFolder(folder).data / "generated")
    with contextlib.ExitStack() as held, _all_processes(recipe, folder, held):
        made = _checked_and_made(recipe, folder)
        run = Run(made, folder, placement=recipe.train.target_placement)
        write_texts(run)
        data = training_data(run)
        if run.placement == "absent":
            # The training asks for it, and its target may not be there then.
            _ = run.cached_target
        if run.recipe.head is not None:
            with first_before_others("it labels draft tokens"):
                labelled_tokens(run.recipe, run.folder, run.target, data)


def export(recipe: Recipe, folder: Path) -> None:
    """Write the drafter folder of a run, evaluate it, and hold it against the gate.

    A training that has not ended gives what it has: the best weights so far, or those of its newest checkpoint.
    """
    if not RunFolder(folder).has_weights():
        raise DrafttrainError(f"{folder}: nothing is trained here yet: drafttrain fit does all stages")
    check_engines(recipe.export, recipe.drafter.kind if recipe.drafter else None, where=folder)
    run = Run(_checked_and_made(recipe, folder), folder)
    run.folder.drop_figures()
    export_and_judge(run)


def export_run_as(recipe: Recipe, folder: Path, formats: Sequence[str], *, verify: bool, out: Path | None) -> None:
    """Write the exported drafter of a run in further formats, and prove them in serving engines or not."""
    here = RunFolder(folder)
    recipe = settled(_with_models_made(recipe, folder.parent), here.held())
    source = next((place for place in (here.drafter, here.rejected) if place.exists()), None)
    if source is None or recipe.drafter is None:
        raise CheckpointError(f"{folder}: no drafter was exported here yet: drafttrain fit does all stages")
    dropped = json.loads(here.overlap.read_text(encoding="utf-8"))["dropped"] if here.overlap.exists() else []
    stand = Stand(
        target=recipe.target,
        eval=recipe.eval,
        export=only(recipe.export, formats, recipe.drafter.kind, verify=verify),
        dropped=[id for name, id in dropped if name == recipe.eval.prompts],
    )
    write_and_verify(source, stand, out=out)


def export_drafter_as(
    drafter: str,
    formats: Sequence[str],
    overrides: Sequence[str],
    *,
    target: str | None,
    verify: bool,
    out: Path | None,
) -> None:
    """Write a drafter folder in further formats, and prove them in serving engines or not.

    Args:
        overrides: Of the sections target, eval and export.
        target: Its model; left out, the one that the drafter was made for.
    """
    from drafttrain.checkpoint import read_about

    quiet_libraries()
    of_target, of_eval, of_export = load_sections(["target", "eval", "export"], overrides)
    (source,) = folders_of([drafter])
    about = read_about(source)
    target = target or (about.target if about else None)
    if not target and not any(override.startswith("target.model=") for override in overrides):
        raise CheckpointError(f"{drafter}: does not say which target it was made for: give --target")
    stand = Stand(
        target=replace(of_target, model=target) if target else of_target,
        eval=of_eval,
        export=only(of_export, formats, about.kind if about else "causal_lm", verify=verify),
    )
    write_and_verify(source, stand, out=out)


def import_drafter(folder: Path, *, target: str | None, out: Path | None) -> None:
    """Write the drafter folder of one that somebody else trained, and say what was changed on the way.

    Args:
        target: What it was made for; left out, what it says itself.
        out: Left out: beside it.
    """
    from drafttrain.importers.convert import import_folder

    quiet_libraries()
    folder = folder.resolve()
    out = out or folder.with_name(f"{folder.name}.drafter")
    made = import_folder(folder, out, target=target)
    for note in made.notes:
        say(f"{folder.name}: {note}")
    say(f"imported: {out} (drafter.kind {made.files.kind})")


def evaluate_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Evaluate the exported files of a run, beside its own start, and write eval.json."""
    from drafttrain.eval.table import show

    here = RunFolder(folder)
    what, places = (
        ("head", (here.head, here.rejected_head)) if recipe.head else ("drafter", (here.drafter, here.rejected))
    )
    exported = next((place for place in places if place.exists()), None)
    held = here.held()
    if held is None or exported is None:
        raise CheckpointError(f"{folder}: no {what} was exported here yet: drafttrain fit does all stages")
    recipe = _with_models_made(recipe, folder.parent)
    check_parts(recipe, data=False)
    # The files were exported as the run says, whatever the recipe now asks of an export.
    run = Run(replace(recipe, export=held.export), folder, quiet=True, evaluates_only=True)
    if recipe.head is not None:
        result = evaluated_head(run)
    else:
        folders = {"drafter": exported}
        if run.folder.start.exists():
            folders["start"] = run.folder.start
        result = evaluated(folders, run.target, recipe.eval, dropped=dropped_prompts(run, recipe.eval.prompts))
    result |= {"inputs": inputs_of(run.recipe, only=is_evaluated_on)}
    write_json(run.folder.eval, result)
    show(result)
    return result


def evaluate_drafters(
    drafters: Sequence[str], target: str | None, overrides: Sequence[str], *, out: Path | None = None
) -> None:
    """Evaluate one drafter, or compare two, pairwise: local folders, hub ids or builtin ones.

    Args:
        target: Its model; left out, the one that the first drafter was made for.
        overrides: Of the sections target and eval.
        out: Folder for eval.json and report.html; left out, the first drafter's if it is a local folder.
    """
    from drafttrain.checkpoint import read_about
    from drafttrain.eval.report import write_report
    from drafttrain.eval.table import show
    from drafttrain.target_model import Target

    quiet_libraries()
    of_target, settings = load_sections(["target", "eval"], overrides)
    folders = folders_of(drafters)
    if target is None and not any(override.startswith("target.model=") for override in overrides):
        about = read_about(folders[0])
        if about is None:
            raise CheckpointError(f"{drafters[0]}: does not say which target it was made for: give --target")
        target = about.target
    names = ["A", "B"] if len(folders) == 2 else ["drafter"]
    for letter, drafter in zip(names, drafters, strict=True):
        say(f"{letter}: {drafter}")
    of_target = replace(of_target, model=target) if target else of_target
    check_drafters(of_target, [str(one) for one in folders])
    loaded = Target.load(of_target)
    result = evaluated(dict(zip(names, folders, strict=True)), loaded, settings, dropped=())
    result |= {"inputs": target_inputs(replace(of_target, model=loaded.name), settings.prompts)}
    show(result)
    if out is None and not Path(drafters[0]).is_dir():
        say("eval.json and report.html: not written, --out DIR says where to")
        return
    out = out or folders[0]
    write_json(out / "eval.json", result)
    write_report(out / "report.html", result, title=folders[0].name, metrics=None, command=command_line())
    say(f"written: {out / 'eval.json'}, {out / 'report.html'}")


def learn_online(recipe: Recipe, folder: Path, *, once: bool = False) -> None:
    """Learn from serving logs and publish what is better: once, or until the process is told to stop."""
    from drafttrain.online.report import write_online_report

    if recipe.online is None:
        raise RecipeError(recipe.name, ["online: missing: this recipe trains once; drafttrain fit does"])
    with RunFolder(folder).taken():
        clear_leftovers(folder)
        _check_parts(recipe, folder)
        run = Run(recipe, folder)
        write_drafter(run, run.drafter, run.folder.start, steps=0)
        learning = online_run(run.recipe, run.folder, run.target)
        if once:
            learning.once()
            report(run.folder, title=recipe.name)
        else:
            learning.for_ever(lambda: write_online_report(folder, run.folder.report, title=recipe.name))
    show_status(folder)


def rollback(folder: Path, *, route: str | None = None) -> None:
    """Serve the version again that the current one replaced; one of several drafters is named by its route."""
    from drafttrain.online.run_files import routes_of
    from drafttrain.online.versions import Versions

    routes = routes_of(folder)
    if (route or "") not in routes:
        known = ", ".join(name for name in routes if name)
        raise RecipeError("arguments", [f"several drafters are here: give one of {known} after the folder"])
    held = RunFolder(folder).held()
    settings = held.online if held is not None and held.online is not None else None
    hook = settings.on_publish if settings else []
    timeout = settings.hook_timeout_seconds if settings else 60.0
    versions = Versions(routes[route or ""].folder, hook=hook, hook_timeout_seconds=timeout)
    before, now = versions.rollback()
    say(f"{versions.folder / 'current'}: {now} again, instead of {before}")


def _with_models_made(recipe: Recipe, runs: Path, *, above: Sequence[str] = ()) -> Recipe:
    """Return the recipe with folders where it names other recipes, whose runs in `runs` are brought up to date first.

    Raises:
        RecipeError: A recipe needs what it makes itself.
    """
    recipe = copy.deepcopy(recipe)
    for settings, key in made_by_recipes(recipe):
        name = getattr(settings, key).removeprefix(MADE_BY)
        made = load_recipe(name)
        path = [*above, recipe.name, made.name]
        if made.name in path[:-1]:
            raise RecipeError(name, [f"{key}: a recipe cannot need what it makes: {' needs '.join(path)}"])
        say(f"{recipe.name}: {key} is what {made.name} makes: {runs / made.name}")
        fit(made, runs / made.name, above=path[:-1])
        wait_for_all(f"{made.name} is exported")
        of_run = RunFolder(runs / made.name)
        setattr(settings, key, str(of_run.head if made.head is not None else of_run.drafter))
    return recipe


def _checked_and_made(recipe: Recipe, folder: Path, *, above: Sequence[str] = ()) -> Recipe:
    """Return the recipe with the models that other recipes make, its parts checked before anything is made, and with them."""
    _check_parts(recipe, folder)
    if not list(made_by_recipes(recipe)):
        return recipe
    made = _with_models_made(recipe, folder.parent, above=above)
    _check_parts(made, folder)
    return made


def _check_parts(recipe: Recipe, folder: Path) -> None:
    """Look once whether the parts of a recipe fit together; a finished training does not read its data again."""
    with first_before_others("it looks whether target, drafter, data and export fit together"):
        if is_first():
            quiet_libraries()
            check_parts(recipe, data=not RunFolder(folder).train_done.exists())


@contextlib.contextmanager
def _all_processes(recipe: Recipe, folder: Path, held: contextlib.ExitStack) -> Iterator[None]:
    """Join the processes that a launcher started, and look that they can work together, before anything is loaded.

    Args:
        held: Until it closes, the first process holds the run folder.
    """
    settings = recipe.train
    if settings.target_placement == "sharded" and not launched():
        problem = "there is one process, and nothing to spread a target over: start several (docs/multi-node.md)"
        raise RecipeError(recipe.name, [f"train.target_placement: sharded: {problem}"])
    if problems := list(_of_devices(recipe)):
        raise RecipeError(recipe.name, problems)
    with together(timeout_seconds=settings.timeout_seconds):
        if launched():
            from drafttrain.train.preflight import check_processes

            check_processes(recipe.name, dump_recipe(recipe), folder, settings)
        with first_before_others("it takes the run folder and clears what a killed run left"):
            if is_first():
                held.enter_context(RunFolder(folder).taken())
                clear_leftovers(folder)
        yield


def _of_devices(recipe: Recipe) -> Iterator[str]:
    """Tell which devices of the recipe are not here, or cannot be trained on by the processes that are there."""
    import torch

    from drafttrain.target_model.device import pick_device

    places = {"train.device": recipe.train.device, "target.device": recipe.target.device}
    for key, device in places.items():
        try:
            pick_device(device)
        except DrafttrainError as error:
            yield f"{key}: {error}"
    if launched():
        numbered = {key: device for key, device in places.items() if device.startswith("cuda:")}
        several = f"and there are {world().size} processes: leave it at auto"
        yield from (f"{key}: {device} is one device, {several}" for key, device in numbered.items())
    key = "target.device" if recipe.train.device == "auto" else "train.device"
    if places[key] == "cpu" and torch.cuda.is_available() and (launched() or recipe.train.deepspeed is not None):
        yield f"{key}: cpu: DeepSpeed trains on CUDA wherever it sees a device: hide them all with CUDA_VISIBLE_DEVICES="


def _fit_head(run: Run) -> None:
    data = training_data(run)
    with first_before_others("it labels draft tokens"):
        labelled = labelled_tokens(run.recipe, run.folder, run.target, data)
    fit_head(run.recipe, run.folder, labelled)


def folders_of(drafters: Sequence[str]) -> list[Path]:
    """Return the local folders of drafters, or every one that cannot be found."""
    from drafttrain.target_model.folders import resolve_folder

    folders, problems = [], []
    for name in drafters:
        try:
            folders.append(resolve_folder(name))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("arguments", problems)
    return folders
