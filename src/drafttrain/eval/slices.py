"""Slices of the prompts of an evaluation: by domain, language, turn and length of the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from drafttrain.eval.interval import Interval
from drafttrain.eval.metrics import PromptCounts
from drafttrain.eval.statistics import Part, ratio_interval, summed_by

T = TypeVar("T")

CONTEXTS = (256, 1024, 4096, 16384, 65536)
"""Bounds of the slices by tokens of the prompt."""


def part_of(counts: Sequence[PromptCounts]) -> Part:
    """Return tokens and rounds; the turns of a conversation are summed, because they depend on each other."""
    tokens, rounds = ([getattr(c, name) for c in counts] for name in ("num_tokens", "num_rounds"))
    tokens_P, rounds_P = summed_by([c.unit for c in counts], tokens, rounds)
    return tokens_P, rounds_P


def slices_of(counts: Sequence[PromptCounts]) -> dict[str, dict[str, Interval]]:
    """Return block efficiency by slice; an axis on which all prompts are alike is left out."""
    return by_slice(counts, lambda places: ratio_interval(*part_of([counts[place] for place in places])))


def by_slice(counts: Sequence[PromptCounts], figure: Callable[[Sequence[int]], T]) -> dict[str, dict[str, T]]:
    """Return a figure of each slice of each axis on which the prompts differ.

    Args:
        figure: Computes it from the places of the slice's prompts.
    """
    found = {}
    for axis, key in AXES.items():
        places: dict[tuple[int, str], list[int]] = {}
        for place, one in enumerate(counts):
            places.setdefault(key(one), []).append(place)
        if len(places) > 1:
            found[axis] = {label: figure(places[order, label]) for order, label in sorted(places)}
    return found


def _context(counts: PromptCounts) -> tuple[int, str]:
    if counts.context is None:
        return (0, "unknown")
    order = sum(counts.context >= bound for bound in CONTEXTS)
    low, high = (0, *CONTEXTS)[order], (*CONTEXTS, None)[order]
    return order, f"{low} or more tokens" if high is None else f"{low} to {high - 1} tokens"


AXES: Mapping[str, Callable[[PromptCounts], tuple[int, str]]] = {
    "domain": lambda counts: (0, counts.domain),
    "language": lambda counts: (0, counts.language),
    "turn": lambda counts: (counts.turn, str(counts.turn)),
    "context": _context,
}
"""By axis: the place and the label of a prompt's slice."""
