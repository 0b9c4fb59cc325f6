"""The proposer of P-EAGLE: one pass a round over the newly accepted tokens and the mask slots after them.

B = sequences, N = committed slots of one call, S = mask slots of a sequence, G = sequences that draft, K = draft tokens, D = hidden
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
from drafttrain.drafters.eagle.feature_proposer import FeatureProposer
from drafttrain.drafters.p_eagle.decoding import DecodingPEagle, PEagleModel
from drafttrain.drafters.tree_draft import Trees
from drafttrain.target_model import Target


class PEagleProposer(FeatureProposer[DecodingPEagle]):
    """Drafts chains and trees. The last committed slot gives the first draft token, the mask slots after it give the others."""

    def __init__(self, model: PEagleModel, target: Target, listener: ForwardListener | None = None) -> None:
        super().__init__(model, DecodingPEagle(model, device=target.device), target, listener)
        self._num_depths = model.num_depths
        self._weights = model.decoding_weights()

    @torch.no_grad()
    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read all slots of the prompts except the last."""
        super().begin(contexts, seen)
        sizes = [max(0, size - 1) for size in self._unread.sizes]
        if any(sizes):
            span = Span(self._device)
            self._read(sizes, num_masks=0)
            self._report(sizes, num_masks=0, span=span, prefill=True)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, or one tree of the slots' tokens if its budget is wider than 1."""
        # After a prompt of one token there are no features yet.
        budgets = [
            budget.within(self._num_depths if size else 0)
            for budget, size in zip(budgets, self._unread.sizes, strict=True)
        ]
        round_of = (self._contexts, budgets, sampling, generators, more)
        chains = self._draft.begin(*round_of)
        if not (growing := chains.growing):
            return chains.proposals()
        logits_GKR, states_GKD = self._pass(growing, num_masks=max(min(one.nodes, one.depth) for one in budgets) - 1)
        if any(budget.width > 1 for budget in budgets):
            return self._trees(growing, self._tree_draft.begin(*round_of), logits_GKR, states_GKD)
        chains.extend(logits_GKR, states_GKD)
        return chains.proposals()

    def _trees(self, growing: Sequence[int], trees: Trees, logits_GKR: Tensor, states_GKD: Tensor) -> list[Proposal]:
        """Return the tree of each sequence; of one that does not draft, the root."""
        if len(growing) < len(self._contexts):
            # Nothing reads the rows of the others.
            rows_B = [growing.index(number) if number in growing else 0 for number in range(len(self._contexts))]
            on_device_B = torch.tensor(rows_B).to(self._device)
            logits_GKR, states_GKD = (values.index_select(0, on_device_B) for values in (logits_GKR, states_GKD))
        trees.extend_to_the_end(logits_GKR, states_GKD)
        return trees.proposals()

    def _pass(self, growing: Sequence[int], *, num_masks: int) -> tuple[Tensor, Tensor]:
        """Read the unread slots of these sequences and mask slots after them; return (logits_GKR, states_GKD) of the next tokens."""
        span = Span(self._device)
        sizes = [size if number in growing else 0 for number, size in enumerate(self._unread.sizes)]
        states_GKD = self._read(sizes, num_masks=num_masks)
        if len(growing) < len(states_GKD):
            states_GKD = states_GKD.index_select(0, torch.tensor(growing).to(self._device))
        logits_GKR = self._layers.head(states_GKD)
        self._report(sizes, num_masks=num_masks, span=span)
        return logits_GKR, states_GKD

    def _read(self, sizes: Sequence[int], *, num_masks: int) -> Tensor:
        tokens, features_BNF = self._unread.take(self._contexts, starts=self._layers.lengths, sizes=sizes)
        return self._layers.read(tokens, features_BNF, num_masks=num_masks)

    def _report(self, sizes: Sequence[int], *, num_masks: int, span: Span, prefill: bool = False) -> None:
        """Report one pass to the listener. The head runs in a round, not over a prompt."""
        if self._listener is None:
            return
        fusion, layers, head, row = self._weights
        num_read, growing = sum(sizes), sum(size > 0 for size in sizes)
        lengths = [length - size for length, size in zip(self._layers.lengths, sizes, strict=True)]
        read = [size + num_masks * (size > 0) for size in sizes]
        # The head reads the last token's state and those of the masks.
        head_rows = 0 if prefill else (1 + num_masks) * growing
        shape = ForwardShape.of(read, lengths, num_layers=self._layers.num_layers, head_rows=head_rows)
        columns = self._layers.bytes_per_slot() * (shape.context + shape.num_tokens)
        work = fusion.read(num_read) + layers.read(shape.num_tokens, pairs=shape.pairs)
        if head_rows:
            work += head.read(head_rows)
        work += Work(row_bytes=row * num_read, cache_bytes=columns)
        self._listener(ForwardEvent("drafter", shape, work, span.end(), prefill=prefill))
