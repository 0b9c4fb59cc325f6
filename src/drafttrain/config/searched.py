"""Recipes of drafters that are searched instead of trained: which sections and keys they lack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from drafttrain.drafters import drafters


def is_searched(kind: Any) -> bool:
    """Return whether a drafter of this kind has no weights to train."""
    component: Any = drafters.entry(kind).component if isinstance(kind, str) and kind in drafters.names() else None
    return bool(getattr(component, "searched", False))


def searched_kinds() -> list[str]:
    """Return the kinds of drafters that have no weights to train."""
    return [name for name in drafters.names() if is_searched(name)]


def needs_no_loss(given: Mapping[str, Any]) -> bool:
    """Return whether a recipe that gives these keys has no loss: it trains a head, or searches its drafter."""
    drafter = given["drafter"].value if "drafter" in given else None
    kind = drafter["kind"].value if isinstance(drafter, dict) and "kind" in drafter else None
    return ("head" in given and given["head"].value is not None) or is_searched(kind)


def problems_of_search(recipe: Any) -> Iterator[str]:
    """Yield what a searched drafter would ignore."""
    kind, train, data = recipe.drafter.kind, recipe.train, recipe.data
    if recipe.loss is not None:
        yield f"loss: drafter.kind {kind} has no weights to train, it is searched: leave the section out"
    if data.cache != "none":
        yield f"data.cache: the search of drafter.kind {kind} runs the target itself: set none, got {data.cache}"
    if recipe.online is not None:
        yield f"online: drafter.kind {kind} has no weights that learn: leave the section out, and see eval.beside swift"
    if (train.devices or 1) > 1:
        yield f"train.devices: drafter.kind {kind} is searched by one process: set 1, got {train.devices}"
    if train.deepspeed is not None:
        yield f"train.deepspeed: drafter.kind {kind} has no weights to train: leave it out"
    if train.device != "auto":
        yield f"train.device: drafter.kind {kind} runs the target's blocks: leave it at auto, got {train.device}"


def problems_of_swift(recipe: Any) -> Iterator[str]:
    """Yield proposers that start with a set of skipped sublayers that the drafter does not have."""
    for one in recipe.eval.beside:
        if (
            getattr(one, "kind", "") == "swift"
            and one.reads_drafter
            and getattr(recipe.drafter, "kind", "") != "layer_skip"
        ):
            yield "eval.beside: swift with start: drafter needs drafter.kind layer_skip: use start: even"
