"""The memory of decoding with a drafter: weights, caches, logits, distributions and masks of both models.

V = vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from drafttrain.core.generations import ForwardEvent
from drafttrain.core.proposals import Budget
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.target_model import Target

FLOAT32 = 4
MODELS = ("target", "drafter")
ROWS_OF_A_DRAW = 6
"""Rows over the vocabulary, in float32, that a draw holds at once: a distribution, the next one, and running sums in float64."""


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes that decoding holds, by the draft of a round and the length of the text.

    Activations of a layer are not counted: of a few tokens they are small beside their logits. A prefill is not counted either.

    Source: Selin Yildirim and Deming Chen 2025, SpecMemo, arXiv 2506.01206, for the parts; rows of logits and of distributions, the
    hidden cost of large vocabularies, are added.
    """

    weight_bytes: int
    """Of both models; shared weights once."""
    events: Sequence[ForwardEvent]
    """The forwards so far: the caches' sizes are read from the last ones."""
    vocab_size: int
    element_bytes: int
    """Of a number of the target."""
    sampled: bool
    """Draft tokens are drawn, so each has a row of q."""
    columns_at_once: int = 64
    """Caches grow by an eighth, in multiples of this many columns."""

    @classmethod
    def of(
        cls, target: Target, drafter: Drafter | None, sampling: Sampling, events: Sequence[ForwardEvent]
    ) -> DecodingMemory:
        """Return the memory of a target and a drafter; None: a proposer without weights."""
        models = [target.model] if drafter is None else [target.model, drafter]
        weights = {id(p): p.numel() * p.element_size() for model in models for p in model.parameters()}
        return cls(
            sum(weights.values()),
            events,
            vocab_size=target.vocab_size,
            element_bytes=target.model.dtype.itemsize,
            sampled=sampling.temperature > 0 and getattr(drafter, "draft", "") != "greedy",
        )

    @property
    def column_bytes(self) -> int:
        """Keys and values of a token of one sequence, in both caches; 0 before the first calls."""
        found: dict[str, int] = {}
        for event in reversed(self.events):
            cached = event.shape.context + event.shape.num_tokens
            # The target's first blocks are a part of its calls, and share its cache.
            if event.model in MODELS and event.model not in found and event.shape.pairs:
                found[event.model] = event.work.cache_bytes // cached
            if len(found) == len(MODELS):
                break
        return sum(found.values())

    def parts(self, draft: Budget, num_tokens: int, *, prompt: int | None = None, batch: int = 1) -> Mapping[str, int]:
        """Return the bytes of each part at the peak of a round.

        Args:
            num_tokens: Of each sequence's text.
            prompt: Its first tokens that were read at once: caches have grown since. None: they have just the room that is needed.
        """
        nodes, cached = draft.nodes + 1, num_tokens + draft.nodes
        row = self.vocab_size * max(FLOAT32, self.element_bytes)
        logits = nodes * self.vocab_size * self.element_bytes
        tree = draft.width > 1
        q = 0 if tree or not self.sampled else draft.nodes * row
        # The rows of a chain exist twice while they are stacked and verified; without any, a draw of the target's own token remains.
        verifying = logits + q + max(q, ROWS_OF_A_DRAW * row if self.sampled else 0)
        drafting = self._levels(draft) * self.vocab_size * self.element_bytes if tree else 2 * q
        # Only a tree has a mask: numbers and booleans over the cache and its own nodes.
        mask = nodes * (num_tokens + nodes) * (self.element_bytes + 1) if tree else 0
        return {
            "weights": self.weight_bytes,
            "caches": batch * self.columns(cached, prompt or cached) * self.column_bytes,
            "logits and distributions": batch * max(verifying, drafting),
            "masks": batch * mask,
        }

    def peak(self, draft: Budget, num_tokens: int, *, prompt: int | None = None, batch: int = 1) -> int:
        """Return the bytes at the peak of a round."""
        return sum(self.parts(draft, num_tokens, prompt=prompt, batch=batch).values())

    def largest(self, limit_bytes: float, draft: Budget, num_tokens: int, *, prompt: int | None = None) -> Budget:
        """Return the largest part of a draft whose round stays within the limit: as deep as possible, then as many nodes."""
        for depth in range(draft.depth, 0, -1):
            part = draft.within(depth)
            fits, too_large = 0, part.nodes + 1
            while too_large - fits > 1:
                middle = (fits + too_large) // 2
                small = self.peak(_with_nodes(part, middle), num_tokens, prompt=prompt) <= limit_bytes
                fits, too_large = (middle, too_large) if small else (fits, middle)
            if fits >= depth:
                return _with_nodes(part, fits)
        return draft.within(0)

    def columns(self, num_tokens: int, prompt: int) -> int:
        """Return the columns that are allocated for so many cached tokens, after a prompt of this length."""
        room = self._whole(prompt)
        while room < num_tokens:
            room = self._whole(room + max(1, room // 8))
        return room

    def _whole(self, columns: int) -> int:
        return -(-columns // self.columns_at_once) * self.columns_at_once

    def _levels(self, draft: Budget) -> int:
        """Return the rows of the drafter's logits that exist at once: those of the last call, and of the call before it."""
        widest = draft.width**2 if draft.depth > 1 else draft.width
        return 2 * draft.width + widest


def _with_nodes(draft: Budget, nodes: int) -> Budget:
    return Budget(nodes, min(draft.depth, nodes), draft.width, draft.states)


@runtime_checkable
class FitsMemory(Protocol):
    """A length policy that limits what decoding holds."""

    def fit(self, memory: DecodingMemory) -> None:
        """Store what decoding takes. Called before the first round."""
        ...
