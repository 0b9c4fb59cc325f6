"""drafttrain gen: only the data of a recipe."""

from __future__ import annotations

import contextlib
from pathlib import Path

from drafttrain.commands.fit import fit
from drafttrain.commands.made_models import checked_with_made_models
from drafttrain.commands.processes import joined_processes
from drafttrain.config.recipe import Recipe
from drafttrain.pipeline.data import check_data_engines, write_texts
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.kinds import kind_of_run


def gen(recipe: Recipe, folder: Path) -> None:
    """Generate, encode, label and cache the data of a recipe; several processes share the work."""
    check_data_engines(recipe, RunFolder(folder).data)
    with contextlib.ExitStack() as held, joined_processes(recipe, folder, held):
        made = checked_with_made_models(recipe, folder, fit=fit)
        run = kind_of_run(made)(made, folder, placement=recipe.train.target_placement)
        write_texts(run)
        run.prepare()
