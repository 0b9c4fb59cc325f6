"""What a recipe with `target.images` cannot combine: only this project's own loading and decoding read images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

KINDS = ("eagle",)
"""Kinds of drafters that are trained on records with images."""


def problems_of_images(recipe: Any) -> Iterator[str]:
    """Yield what does not read images in a recipe whose target does, and what needs such a target."""
    visual = getattr(recipe.drafter, "visual", False)
    if not recipe.target.images:
        if visual:
            yield "drafter.visual: needs a target that reads images: set target.images: true"
        if recipe.data.curriculum is not None:
            yield "data.curriculum: needs records with images: set target.images: true"
        return
    yield from _elsewhere(recipe)
    kind = getattr(recipe.drafter, "kind", None)
    if recipe.drafter is None or kind not in KINDS:
        what = "a head" if recipe.drafter is None else f"drafter.kind {kind}"
        yield f"target.images: {what} is not trained on records with images; drafter.kind must be one of: {', '.join(KINDS)}"
    if visual and recipe.export.to:
        yield (
            "export.to: no engine's format has a drafter that reads the projector's embeddings: leave it empty, or set "
            "drafter.visual: false"
        )


def _elsewhere(recipe: Any) -> Iterator[str]:
    data, placement = recipe.data, recipe.train.target_placement
    if placement != "replicated":
        yield f"target.images: train.target_placement must be replicated, got {placement}"
    if data.states.kind != "builtin":
        yield f"target.images: data.states must be builtin, got {data.states.kind}: engines are given tokens only"
    if data.generate is not None and data.generate.backend.kind != "builtin":
        yield (
            f"target.images: data.generate.backend must be builtin, got {data.generate.backend.kind}: engines are given "
            "tokens only"
        )
    for name, section in (("data.on_policy", data.on_policy), ("online", recipe.online)):
        if section is not None:
            yield f"target.images: {name} reads text only: leave the section out"
