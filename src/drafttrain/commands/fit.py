"""drafttrain fit: all stages of a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from drafttrain.commands.made_models import checked_with_made_models
from drafttrain.commands.online import learn_online
from drafttrain.commands.processes import joined_processes
from drafttrain.config.recipe import Recipe
from drafttrain.distributed.world import is_first
from drafttrain.pipeline.data import check_data_engines, write_texts
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.judging import export_and_judge
from drafttrain.pipeline.kinds import kind_of_run
from drafttrain.pipeline.serving import check_engines


def fit(recipe: Recipe, folder: Path, *, above: Sequence[str] = ()) -> None:
    """Run all stages of a recipe; finished stages are skipped. With a section `online`: learn once from the existing logs.

    Several processes generate, cache and train together; then the first one exports and evaluates.

    Args:
        above: Recipes that need the model of this one.
    """
    if recipe.online is not None:
        learn_online(recipe, folder, once=True)
        return
    check_engines(recipe.export, recipe.drafter.kind if recipe.drafter else None, where=folder)
    check_data_engines(recipe, RunFolder(folder).data)
    with contextlib.ExitStack() as held:
        with joined_processes(recipe, folder, held):
            made = checked_with_made_models(recipe, folder, fit=fit, above=above)
            run = kind_of_run(made)(made, folder, placement=recipe.train.target_placement)
            if is_first() and not run.folder.train_done.exists():
                # They are of an export before the end of the training. After a kill they would pass for those of its end.
                run.folder.remove_results()
            write_texts(run)
            run.train()
        if is_first():
            run.continue_alone()
            export_and_judge(run)
