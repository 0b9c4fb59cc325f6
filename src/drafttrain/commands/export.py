"""drafttrain export: the drafter folder of a run, and further formats of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drafttrain.checkpoint import read_about
from drafttrain.commands.fit import fit
from drafttrain.commands.made_models import checked_with_made_models, with_made_models
from drafttrain.commands.named_drafters import folders_of
from drafttrain.config.load import load_sections
from drafttrain.config.recipe import Recipe
from drafttrain.core.errors import CheckpointError, DrafttrainError
from drafttrain.data_gen.contamination import read_contamination
from drafttrain.eval.prompts import name_of
from drafttrain.pipeline.auto_types import resolve_auto_types
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.judging import export_and_judge
from drafttrain.pipeline.kinds import kind_of_run
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.pipeline.serving import ServedWith, check_engines, with_formats, write_and_verify


def export_run(recipe: Recipe, folder: Path) -> None:
    """Write the drafter folder of a run, evaluate it, and compare it with the gate.

    Of an unfinished training, the best weights so far or those of the newest checkpoint are exported.
    """
    if not RunFolder(folder).has_weights():
        raise DrafttrainError(f"{folder}: nothing is trained here yet. Run drafttrain fit first")
    check_engines(recipe.export, recipe.drafter.kind if recipe.drafter else None, where=folder)
    recipe = checked_with_made_models(recipe, folder, fit=fit)
    run = kind_of_run(recipe)(recipe, folder)
    run.folder.remove_results()
    export_and_judge(run)


def convert_run(
    recipe: Recipe, folder: Path, formats: Sequence[str], *, verify: bool, speed: bool, out: Path | None
) -> None:
    """Write the exported drafter of a run in further formats; compare them with engines, and measure these, if asked to."""
    here = RunFolder(folder)
    recipe = resolve_auto_types(with_made_models(recipe, folder.parent, fit=fit), here.stored_recipe())
    source = here.exported("drafter")
    served_with = ServedWith(
        target=recipe.target,
        eval=recipe.eval,
        export=with_formats(recipe.export, formats, recipe.drafter.kind, verify=verify, speed=speed),
        dropped=read_contamination(here.contamination, prompts=name_of(recipe.eval.prompts)),
    )
    write_and_verify(source, served_with, out=out)


def convert_drafter(
    drafter: str,
    formats: Sequence[str],
    overrides: Sequence[str],
    *,
    target: str | None,
    verify: bool,
    speed: bool,
    out: Path | None,
) -> None:
    """Write a drafter folder in further formats; compare them with engines, and measure these, if asked to.

    Args:
        overrides: Overrides of the sections target, eval and export.
        target: The target; None: the drafter's own.
    """
    quiet_libraries()
    of_target, of_eval, of_export = load_sections(["target", "eval", "export"], overrides)
    (source,) = folders_of([drafter])
    about = read_about(source)
    export = with_formats(of_export, formats, about.kind if about else "causal_lm", verify=verify, speed=speed)
    target = target or (about.target if about else None)
    if not target and not any(override.startswith("target.model=") for override in overrides):
        raise CheckpointError(f"{drafter}: no target is named in it. Give --target MODEL")
    served_with = ServedWith(
        target=replace(of_target, model=target) if target else of_target,
        eval=of_eval,
        export=export,
    )
    write_and_verify(source, served_with, out=out)
