"""The proposer of Chimera: chains and trees for a list of sequences.

B = sequences, N = slots or newer tokens of one call (the longest sequence's, or of all), D = hidden, R = the drafter's vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape, Work
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.weights import weights_of
from drafttrain.drafters.chimera.decoding import ChimeraModel, DecodingChimera
from drafttrain.drafters.chimera.trigrams import last_trigram
from drafttrain.drafters.eagle.decoding import rows_at
from drafttrain.drafters.eagle.feature_proposer import FeatureProposer
from drafttrain.drafters.eagle.levels import drafted_chains, drafted_trees
from drafttrain.drafters.tree_draft import DraftNode
from drafttrain.target_model import Target


class ChimeraProposer(FeatureProposer[DecodingChimera]):
    """Each call reads the newest tokens: first the root, with the target's new features, then the draft tokens of a level."""

    def __init__(self, model: ChimeraModel, target: Target, listener: ForwardListener | None = None) -> None:
        super().__init__(model, DecodingChimera(model, device=target.device), target, listener)
        self._model = model
        part = model.layer.self_attn
        self._projections = weights_of(part.q_proj, part.k_proj, part.v_proj)
        of_layer = weights_of(model.layer, attention_width=model.layer.attention_width)
        self._of_newer = weights_of(model.blocks, model.fc) + of_layer - self._projections
        """What newer tokens pass through beyond the projections, through which the target's features pass too."""
        self._known: list[Tensor | None] = []
        """By sequence, the target's feature of the token before the root; None: the root is the first token."""

    @torch.no_grad()
    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read the target's features of the prompts."""
        super().begin(contexts, seen)
        self._known = [None] * len(contexts)
        sizes = self._unread.sizes
        if any(sizes):
            span, lengths = Span(self._device), list(self._layers.cache.lengths)
            self._layers.read_known(self._take(sizes), sizes)
            self._report(sizes, [0] * len(sizes), lengths, depths=(), span=span)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, or one tree if the budgets are wider than 1."""
        # Before the first token of a text there is no feature to draft from.
        known = [length + size > 0 for length, size in zip(self._layers.cache.lengths, self._unread.sizes, strict=True)]
        budgets = [
            budget.within(self._model.num_steps if any_known else 0)
            for budget, any_known in zip(budgets, known, strict=True)
        ]
        round_of = (self._contexts, budgets, sampling, generators, more)
        if any(budget.width > 1 for budget in budgets):
            proposals = drafted_trees(self._tree_draft.begin(*round_of), self._read_next)
        else:
            proposals = drafted_chains(self._draft.begin(*round_of), self._read_next)
        self._layers.forget_newer()
        return proposals

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        super().drop(keep)
        self._known = [self._known[i] for i in keep]

    def _read_next(self, growing: Sequence[int], frontiers: Sequence[Sequence[DraftNode]]) -> tuple[Tensor, Tensor]:
        """Return (logits_NR, what the heads read) after each frontier node of each sequence (see `ReadNext`)."""
        span, layers = Span(self._device), self._layers
        starts = [length + newer for length, newer in zip(layers.cache.lengths, layers.num_newer(), strict=True)]
        known = [0] * len(starts)
        if frontiers:
            states_BMD = layers.read_drafts(frontiers)
            depths = [[node.depth + 1 for node in frontier] for frontier in frontiers]
        else:
            known = [size if number in growing else 0 for number, size in enumerate(self._unread.sizes)]
            roots = [
                last_trigram(context.tokens) if number in growing else None
                for number, context in enumerate(self._contexts)
            ]
            states_BMD = layers.read_roots(self._take(known), known, roots)
            depths = [[1] * (number in growing) for number in range(len(known))]
        places = [(number, node) for number, of in enumerate(depths) for node in range(len(of))]
        known_ND = torch.stack([of for number, _ in places if (of := self._known[number]) is not None])
        read_NX = torch.cat([rows_at(states_BMD, places), known_ND], dim=-1)
        of_rows = [depth for of in depths for depth in of]
        logits_NR = layers.head(read_NX, of_rows)
        self._report(known, [len(of) for of in depths], starts, depths=of_rows, span=span)
        return logits_NR, read_NX

    def _take(self, sizes: Sequence[int]) -> Tensor:
        """Remove the first unread features of every sequence; return features_BND."""
        if not any(sizes):
            width, weight = self._model.fc.out_features, self._model.fc.weight
            return weight.new_empty(len(sizes), 0, width)
        _, features_BND = self._unread.take(self._contexts, starts=self._layers.cache.lengths, sizes=sizes)
        for number, size in enumerate(sizes):
            if size:
                self._known[number] = features_BND[number, size - 1]
        return features_BND

    def _report(
        self,
        known: Sequence[int],
        newer: Sequence[int],
        starts: Sequence[int],
        *,
        depths: Sequence[int],
        span: Span,
    ) -> None:
        """Report one call to the listener. Prompts are read without newer tokens.

        Args:
            known: Slots of the target's features by sequence.
            newer: Newer tokens by sequence.
            starts: What was in the cache before the call, by sequence.
            depths: Of the rows of logits.
        """
        if self._listener is None:
            return
        after = [start + size for start, size in zip(starts, known, strict=True)]
        both = [size + more for size, more in zip(known, newer, strict=True)]
        # Only newer tokens attend.
        pairs = ForwardShape.of(newer, after, num_layers=1, head_rows=0).pairs
        shape = replace(ForwardShape.of(both, starts, num_layers=1, head_rows=len(depths)), pairs=pairs)
        work = self._projections.read(shape.num_tokens)
        num_newer = sum(newer)
        if num_newer:
            work += self._of_newer.read(num_newer, pairs=pairs)
            heads = self._model.lm_heads
            for head in {min(depth, len(heads)) for depth in depths}:
                work += weights_of(heads[head - 1]).read(sum(min(depth, len(heads)) == head for depth in depths))
        columns = self._layers.cache.bytes_per_slot() * (shape.num_tokens + (shape.context if num_newer else 0))
        rows = self._model.embedding_row_bytes * 3 * num_newer
        work += Work(row_bytes=rows, cache_bytes=columns)
        self._listener(ForwardEvent("drafter", shape, work, span.end(), prefill=not num_newer))
