"""Data that several runs read: the data folder of each is a link to the one of its settings.

Texts that the target writes are shared by all runs whose texts are equal, also where the rest of their data differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from drafttrain.config.dump import plain
from drafttrain.config.recipe import Recipe
from drafttrain.core.files import clear_leftovers
from drafttrain.data_gen.settings import DataSettings
from drafttrain.eval.settings import EvalSettings
from drafttrain.export.settings import ExportSettings
from drafttrain.losses import losses
from drafttrain.pipeline.folder import PROMPT_SETTINGS, RunFolder
from drafttrain.pipeline.inputs import GENERATED_FROM, OF_TARGET, PROMPTS, VALIDATION, Inputs, inputs_of
from drafttrain.training.settings import TrainSettings

DATA, TEXTS = "data", "texts"


def share_data(recipe: Recipe, run: Path, shared: Path) -> Path:
    """Let a run use the data folder of its settings under `shared/data`; return that folder.

    A run that has a data folder of its own keeps it.
    """
    data = shared / DATA / _data_key(recipe)
    if recipe.data.generate is not None:
        _link(data / "generated", shared / TEXTS / _texts_key(recipe))
    _link(RunFolder(run).data, data)
    return data


def clear_shared(shared: Path) -> None:
    """Remove what killed runs left in the shared folders. No run may be writing there now."""
    for name in (DATA, TEXTS):
        if (shared / name).is_dir():
            clear_leftovers(shared / name)


def cached_together(recipe: Recipe) -> str:
    """Return a key that is equal for runs that read the same cached target outputs.

    A data folder holds one cache. Runs with equal keys, one after the other, make it once.
    """
    steps = replace(TrainSettings(), max_steps=recipe.train.max_steps, batch_size=recipe.train.batch_size)
    read = replace(recipe, name="", loss=None, train=steps, eval=EvalSettings(), export=ExportSettings())
    distribution = recipe.loss is not None and losses.build(recipe.loss).needs_target
    return f"{_data_key(recipe)} {_digest(read)} {distribution}"


def _data_key(recipe: Recipe) -> str:
    """Return a digest of what the data folder depends on: texts, encoded records, contamination."""
    prompts = EvalSettings(**{name: getattr(recipe.eval, name) for name in PROMPT_SETTINGS})
    return _digest(replace(_without_training(recipe), eval=prompts), files=inputs_of(recipe, only=_is_read_by_data))


def _texts_key(recipe: Recipe) -> str:
    """Return a digest of what the generated texts depend on."""
    data = DataSettings(sources=[], max_length=recipe.data.max_length, generate=recipe.data.generate)
    files = inputs_of(recipe, only=lambda key: key in OF_TARGET or key.startswith(GENERATED_FROM))
    return _digest(replace(_without_training(recipe), data=data, eval=EvalSettings()), files=files)


def _is_read_by_data(key: str) -> bool:
    """Return whether the data folder depends on the content of an input."""
    return key in (*OF_TARGET, PROMPTS, VALIDATION) or key.startswith("data.")


def _without_training(recipe: Recipe) -> Recipe:
    return replace(recipe, name="", drafter=None, loss=None, train=TrainSettings(), export=ExportSettings())


def _digest(recipe: Recipe, *, files: Inputs | None = None) -> str:
    return hashlib.sha256(json.dumps([plain(recipe), files]).encode()).hexdigest()[:10]


def _link(place: Path, to: Path) -> None:
    """Make `place` a link to a folder, relative, so that both can move together."""
    to.mkdir(parents=True, exist_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    link = os.path.relpath(to, place.parent)
    if place.is_symlink() and os.readlink(place) != link:
        place.unlink()
    if not place.exists():
        place.symlink_to(link, target_is_directory=True)
