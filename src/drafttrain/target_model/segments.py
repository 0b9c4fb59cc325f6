"""A causal LM that decodes one sequence segment by segment: a token may leave after any of them.

N = rows of one call, D = hidden, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.target_model.block_range import block_range
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.part import Part
from drafttrain.target_model.ragged_cache import RaggedCache


class SegmentedLM(CachedLM):
    """A causal LM whose blocks are run in segments, with a cache for each.

    A token that leaves early waits before the segments that it has not entered. The next token that goes further takes it along: both
    are rows of one call. So the keys and values that a token attends to are always those of the whole model, and blocks behind the last
    exit of a text are never run.

    Args:
        boundaries: Blocks before each inner boundary, ascending.
    """

    def __init__(
        self, model: Any, *, boundaries: Sequence[int], name: str, listener: ForwardListener | None = None
    ) -> None:
        super().__init__(model, name=name, listener=listener)
        self.segments = [range(*pair) for pair in pairwise([0, *boundaries, self._num_layers])]
        self._segment_caches: list[RaggedCache] = []
        self._tokens: list[int] = []
        self._waiting: list[list[Tensor]] = []

    def start(self, prompt: Sequence[int]) -> None:
        """Empty the cache and read a prompt in one call of all blocks; it may be empty."""
        first, *others = self.segments
        self._segment_caches = [RaggedCache(1, layers=slice(first.stop))]
        for segment in others:
            made = RaggedCache(1, layers=slice(segment.start, segment.stop), after=self._segment_caches[0].hf)
            self._segment_caches.append(made)
        self.cache, self._tokens, self._waiting = self._segment_caches[-1], [], [[] for _ in self.segments]
        self.forward([prompt], needs=TargetNeeds(), prefill=True)
        for cache in self._segment_caches:
            cache.commit()

    def add(self, token: int) -> None:
        """Append a token; it waits before the first segment."""
        self._tokens.append(token)

    def run(self, number: int) -> Tensor:
        """Run all tokens that wait before a segment through it, in one call.

        Returns:
            Of the last token: the state state_D that enters the next segment, or its logits_V if this is the last segment.
        """
        segment, states = self.segments[number], self._waiting[number]
        last = number == len(self.segments) - 1
        tokens = self._tokens if number == 0 else [0] * len(states)  # blocks behind the first do not read them
        entering_BND = torch.stack(states)[None] if number else None
        part = Part(
            self.name,
            caches=[self._segment_caches[number]],
            context=block_range(self.model, segment, entering_BND=entering_BND),
            num_layers=len(segment),
            running=segment,
        )
        needs = TargetNeeds(logits=True) if last else TargetNeeds(hidden=(segment.stop,))
        (seen,) = self._read([tokens], parents=None, needs=needs, part=part)
        self._segment_caches[number].commit()
        self._tokens = [] if number == 0 else self._tokens
        self._waiting[number] = []
        if last:
            assert seen.logits_BTV is not None
            return seen.logits_BTV[0, -1]
        assert seen.hidden_BTD is not None
        leaving = list(seen.hidden_BTD[segment.stop][0])
        self._waiting[number + 1] += leaving
        return leaving[-1]

    def _caches(self) -> list[RaggedCache]:
        return self._segment_caches or super()._caches()


def check_segments(model: Any, boundaries: Sequence[int], *, name: str) -> None:
    """Refuse a model whose outputs change when it is run in parts at these boundaries.

    Raises:
        CheckpointError: With the boundary.
    """
    total = int(model.config.get_text_config().num_hidden_layers)
    if list(boundaries) != sorted(set(boundaries)) or not all(0 < one < total for one in boundaries) or not boundaries:
        raise CheckpointError(
            f"{name}: layers must be ascending numbers of 1..{total - 1} ({total} layers), got {list(boundaries)}"
        )
    for boundary in boundaries:
        CachedLM(model, name=name).split_at(boundary)
