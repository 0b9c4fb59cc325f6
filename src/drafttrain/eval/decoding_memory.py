"""The memory of decoding with a drafter: weights, caches, logits, distributions and masks of both models.

V = vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from drafttrain.core.generations import ForwardEvent
from drafttrain.core.proposals import Budget
from drafttrain.core.registry import components_of
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.eval.proposers import TrainingFree
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
    """The target's tokens are drawn."""
    drawn: bool = False
    """Draft tokens are drawn from rows of q: those of chains, and of trees whose budget has a form."""
    chain_in_tree: bool = False
    """The drafter's part of a tree is a chain."""
    rows_a_node: int = 1
    """Rows that the target's call reads for each node: its own, and those of the drafter beside it."""
    columns_at_once: int = 64
    """Caches grow by an eighth, in multiples of this many columns."""

    @classmethod
    def of(
        cls, target: Target, source: Drafter | TrainingFree, sampling: Sampling, events: Sequence[ForwardEvent]
    ) -> DecodingMemory:
        """Return the memory of a target and what drafts for it; a training-free proposer may use a drafter."""
        drafter = source.drafter if isinstance(source, TrainingFree) else source
        models = [target.model] if drafter is None else [target.model, drafter]
        weights = {id(p): p.numel() * p.element_size() for model in models for p in model.parameters()}
        return cls(
            sum(weights.values()),
            events,
            vocab_size=target.vocab_size,
            element_bytes=target.model.dtype.itemsize,
            sampled=sampling.temperature > 0,
            drawn=sampling.temperature > 0 and _draws(source, drafter),
            chain_in_tree=isinstance(source, TrainingFree) and getattr(source.settings, "chain", False),
            rows_a_node=1 if isinstance(source, TrainingFree) else 1 + source.rows_beside,
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
        """Return the bytes of each part at the peak of a round of all sequences.

        Args:
            draft: Of each sequence.
            num_tokens: Of each sequence's text. Caches, logits and masks are as wide as those of the longest one.
            prompt: Its first tokens that were read at once: caches have grown since. None: they have just the room that is needed.
        """
        rows_read = (draft.nodes + 1) * self.rows_a_node
        cached = num_tokens + rows_read - 1
        row = self.vocab_size * max(FLOAT32, self.element_bytes)
        logits = self.vocab_size * self.element_bytes
        rows, level = self._drawn_rows(draft)
        q, draw = rows * row, ROWS_OF_A_DRAW * row
        tree = draft.width > 1
        # Sequences are verified one after the other: a draw of the target's own token exists once.
        verifying = batch * (rows_read * logits + q) + (draw if self.sampled else 0)
        fixed_level = self._levels(draft) if tree and not rows else 0
        # The rows of one sequence exist a third time while they are stacked.
        drafting = batch * (q + max(level, fixed_level) * logits) + max((batch + 1) * q, batch * level * draw)
        # The logits at the rows beside the last accepted node are the next draft.
        kept = batch * (self.rows_a_node - 1) * logits
        # Trees and sequences of different lengths have a mask: numbers and booleans over the cache and the new rows.
        masked = tree or batch > 1 or self.rows_a_node > 1
        mask = rows_read * (num_tokens + rows_read) * (self.element_bytes + 1) if masked else 0
        return {
            "weights": self.weight_bytes,
            "caches": batch * self.columns(cached, prompt or cached) * self.column_bytes,
            "logits and distributions": kept + max(verifying, drafting),
            "masks": batch * mask,
        }

    def peak(self, draft: Budget, num_tokens: int, *, prompt: int | None = None, batch: int = 1) -> int:
        """Return the bytes at the peak of a round."""
        return sum(self.parts(draft, num_tokens, prompt=prompt, batch=batch).values())

    def largest(
        self, limit_bytes: float, draft: Budget, num_tokens: int, *, prompt: int | None = None, batch: int = 1
    ) -> Budget:
        """Return the largest part of a draft whose round stays within the limit: as deep as possible, then as many nodes."""
        for depth in range(draft.depth, 0, -1):
            part = draft.within(depth)
            fits, too_large = 0, part.nodes + 1
            while too_large - fits > 1:
                middle = (fits + too_large) // 2
                held = self.peak(_with_nodes(part, middle), num_tokens, prompt=prompt, batch=batch)
                fits, too_large = (middle, too_large) if held <= limit_bytes else (fits, middle)
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

    def _drawn_rows(self, draft: Budget) -> tuple[int, int]:
        """Return the most rows of q that a sequence has, and the most of them that one call adds."""
        if not self.drawn or not draft.nodes:
            return 0, 0
        if draft.form is not None:
            return draft.form.most_rows(draft)
        chain = min(draft.nodes, draft.depth)
        return (chain, 1) if draft.width == 1 or self.chain_in_tree else (0, 0)

    def _levels(self, draft: Budget) -> int:
        """Return the rows of the drafter's logits that exist at once: those of the last call, and of the call before it."""
        widest = draft.width**2 if draft.depth > 1 else draft.width
        return 2 * draft.width + widest


def _draws(source: Drafter | TrainingFree, drafter: Drafter | None) -> bool:
    """Return whether draft tokens are drawn at temperature > 0: by the drafter, or by a target that drafts for itself."""
    parts = components_of(source.settings) if isinstance(source, TrainingFree) else ()
    own = any(getattr(one, "model", None) == "target" for one in parts)
    return own or getattr(drafter, "draft", "greedy") != "greedy"


def _with_nodes(draft: Budget, nodes: int) -> Budget:
    return replace(draft, nodes=nodes, depth=min(draft.depth, nodes))


@runtime_checkable
class FitsMemory(Protocol):
    """A length policy that limits what decoding holds."""

    def fit(self, memory: DecodingMemory) -> None:
        """Store what decoding takes. Called before the first round."""
        ...
