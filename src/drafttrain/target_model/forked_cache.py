"""Copies of a cached text, so that several texts continue from it and the target reads it once.

G = key-value heads, C = columns, d = width of a head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.growing_layer import GrowingCache, GrowingLayer
from drafttrain.target_model.ragged_cache import RaggedCache


@dataclass(frozen=True)
class CachedText:
    """The keys and values of a text."""

    length: int
    layers: Sequence[tuple[Tensor, Tensor] | None]
    """keys_1GCd and values_1GCd; None: the layer has none of its own."""


def cached_text(lm: CachedLM, length: int) -> CachedText:
    """Return a copy of the first cached tokens of the one sequence that a model reads."""
    assert lm.split is None, "the blocks before the split have a cache of their own"
    (kept,) = lm.cache.kept
    assert length <= kept, f"{length} tokens of {kept}"
    own: list[Any] = list(lm.cache.hf.layers)
    layers = [
        (layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone()) if layer.is_initialized else None
        for layer in own
    ]
    return CachedText(length, layers)


def continue_from(lm: CachedLM, text: CachedText) -> None:
    """Let a model continue a copied text, which stays as it is. Positions are 0, 1, 2, ..."""
    layers = []
    for states in text.layers:
        layer = GrowingLayer()
        if states is not None:
            layer.update(*states)
        layers.append(layer)
    lm.cache = RaggedCache(1, layers=slice(0, None), after=GrowingCache(layers))
    lm.cache.appended([text.length], width=text.length)
    lm.cache.commit()
