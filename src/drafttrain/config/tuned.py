"""What a recipe that trains the target itself cannot have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def problems_of_tuning(recipe: Any, made_of: Any) -> Iterator[str]:
    """Yield what does not go with a drafter that trains its target (`Drafter.tuned_by`).

    Args:
        recipe: A `config.recipe.Recipe`.
        made_of: The drafter's class; None: the kind is unknown.
    """
    tuned_by = getattr(made_of, "tuned_by", None)
    key = tuned_by and tuned_by(recipe.drafter)
    if key is None:
        return
    tunes, train = f"drafter.{key}", recipe.train
    if train.device != "auto":
        yield f"train.device: {train.device}: {tunes} trains the target itself, on its device: leave it at auto"
    if recipe.online is not None:
        yield f"online: {tunes} trains the target itself, and the server keeps the one that it loaded: leave it out"
    if recipe.data.on_policy is not None and made_of.notes(recipe.drafter) is not None:
        yield f"data.on_policy: drafter.kind {recipe.drafter.kind} is trained on what the target noted about texts: leave it out"
    if getattr(recipe.drafter, "mixed_labels", None) is not None and recipe.data.cache != "none":
        yield (
            f"data.cache: drafter.mixed_labels puts the target's tokens into some texts, whose outputs are not cached: set none, got "
            f"{recipe.data.cache}"
        )
    if train.zero_stage == 3 and getattr(recipe.drafter, key).lora is None:
        yield f"{tunes}.lora: null trains a whole copy of the target, which cannot be partitioned: use train.deepspeed.stage 0, 1 or 2"
