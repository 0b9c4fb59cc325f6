"""The proposer of EAGLE drafters: chains and dynamic trees for a list of sequences.

B = sequences, N = slots or draft tokens of one call (the longest sequence's, or of all), F = width of the target
features, or rows of a tree's frontiers, D = hidden, R = the drafter's vocabulary, C = columns of the cache
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape, Work
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters.eagle.cache import EagleCache
from drafttrain.drafters.eagle.decoding import DecodingEagle, rows_at
from drafttrain.drafters.eagle.feature_proposer import FeatureProposer
from drafttrain.drafters.eagle.levels import drafted_chains, drafted_trees
from drafttrain.drafters.eagle.model import EagleModel
from drafttrain.drafters.tree_draft import DraftNode
from drafttrain.target_model import Target


class EagleProposer(FeatureProposer[DecodingEagle]):
    """Drafts from the target's features of the committed text, then from its own states.

    The cache holds committed slots, each computed from the target's own features. A slot can be read once the token after
    it is known. So at the start of a round the last committed slot is unread; reading it gives the first draft token.
    """

    def __init__(self, model: EagleModel, target: Target, listener: ForwardListener | None = None) -> None:
        super().__init__(model, DecodingEagle(model, device=target.device), target, listener)
        self._weights = model.decoding_weights()

    @torch.no_grad()
    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read all slots of the prompts except the last."""
        super().begin(contexts, seen)
        sizes = [max(0, size - 1) for size in self._unread.sizes]
        if any(sizes):
            span = Span(self._device)
            lengths = self._cache.lengths
            self._read(sizes)
            self._report(sizes, lengths, fused=True, head_rows=0, prefill=True, span=span)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, or one tree if the budgets are wider than 1."""
        # After a prompt of one token there are no features yet.
        sizes = self._unread.sizes
        budgets = [budget if size else budget.within(0) for budget, size in zip(budgets, sizes, strict=True)]
        round_of = (self._contexts, budgets, sampling, generators, more)
        if any(budget.width > 1 for budget in budgets):
            proposals = drafted_trees(self._tree_draft.begin(*round_of), self._read_next)
        else:
            proposals = drafted_chains(self._draft.begin(*round_of), self._read_next)
        self._layers.forget_drafts()
        return proposals

    def _read_next(self, growing: Sequence[int], frontiers: Sequence[Sequence[DraftNode]]) -> tuple[Tensor, Tensor]:
        """Return (logits_NR, states_ND) after each frontier node of each sequence (see `ReadNext`)."""
        return self._read_drafts(frontiers) if frontiers else self._read_text(growing)

    def _read_text(self, growing: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read the committed slots that are not cached yet; return (logits_NR, states_ND) of each sequence's last one."""
        span = Span(self._device)
        sizes = [size if number in growing else 0 for number, size in enumerate(self._unread.sizes)]
        lengths = self._cache.lengths
        states_BND = self._read(sizes)
        last_ND = rows_at(states_BND, [(number, sizes[number] - 1) for number in growing])
        logits_NR = self._layers.head(last_ND)
        self._report(sizes, lengths, fused=True, head_rows=len(last_ND), span=span)
        return logits_NR, last_ND

    def _read_drafts(self, frontiers: Sequence[Sequence[DraftNode]]) -> tuple[Tensor, Tensor]:
        """Read the frontiers of all drafts in one call; return (logits_NR, states_ND) after each node."""
        span = Span(self._device)
        sizes = [len(frontier) for frontier in frontiers]
        lengths = [
            length + drafts for length, drafts in zip(self._cache.lengths, self._layers.num_drafts(), strict=True)
        ]
        states_BND = self._layers.read_drafts(frontiers)
        states_ND = rows_at(states_BND, [(number, node) for number, size in enumerate(sizes) for node in range(size)])
        logits_NR = self._layers.head(states_ND)
        self._report(sizes, lengths, fused=False, head_rows=len(states_ND), span=span)
        return logits_NR, states_ND

    def _read(self, sizes: Sequence[int]) -> Tensor:
        """Read the first unread slots of every sequence into the cache; return states_BND."""
        return self._layers.read_slots(*self._unread.take(self._contexts, starts=self._cache.lengths, sizes=sizes))

    @property
    def _cache(self) -> EagleCache:
        return self._layers.cache

    def _report(
        self,
        sizes: Sequence[int],
        lengths: Sequence[int],
        *,
        fused: bool,
        head_rows: int,
        span: Span,
        prefill: bool = False,
    ) -> None:
        """Report one call to the listener: the layer, and the head and the fusion if they ran."""
        if self._listener is None:
            return
        fusion, layer, head, row = self._weights
        shape = ForwardShape.of(sizes, lengths, num_layers=1, head_rows=head_rows)
        columns = self._cache.bytes_per_slot() * (shape.context + shape.num_tokens)
        work = layer.read(shape.num_tokens, pairs=shape.pairs)
        if fused:
            work += fusion.read(shape.num_tokens)
        if head_rows:
            work += head.read(head_rows)
        work += Work(row_bytes=row * shape.num_tokens, cache_bytes=columns)
        self._listener(ForwardEvent("drafter", shape, work, span.end(), prefill=prefill))
