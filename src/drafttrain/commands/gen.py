"""drafttrain gen: only the data of a recipe."""

from __future__ import annotations

import contextlib
from pathlib import Path

from drafttrain.commands.made_models import checked_and_made
from drafttrain.commands.processes import all_processes
from drafttrain.config.recipe import Recipe
from drafttrain.distributed.collectives import first_before_others
from drafttrain.pipeline.data import training_data, write_texts
from drafttrain.pipeline.engines import check_writer
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.head import labelled_tokens
from drafttrain.pipeline.run import Run


def gen(recipe: Recipe, folder: Path) -> None:
    """Generate, encode, label and cache the data of a recipe; several processes share the work."""
    check_writer(recipe, RunFolder(folder).data / "generated")
    with contextlib.ExitStack() as held, all_processes(recipe, folder, held):
        made = checked_and_made(recipe, folder)
        run = Run(made, folder, placement=recipe.train.target_placement)
        write_texts(run)
        data = training_data(run)
        if run.placement == "absent":
            # The training asks for it, and its target may not be there then.
            _ = run.cached_target
        if run.recipe.head is not None:
            with first_before_others("it labels draft tokens"):
                labelled_tokens(run.recipe, run.folder, run.target, data)
