"""Kangaroo at inference: the adapter, with a cache of its own, reads the states of the target's first blocks.

B = sequences, N = new rows of one call, C = cached rows, D = hidden, H = heads, d = width of a head,
R = tokens that can be drafted
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape, Work
from drafttrain.core.proposals import Context, Verdict
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.few_rows import Product
from drafttrain.drafters.first_blocks import FirstBlocksProposer
from drafttrain.target_model.ragged_cache import RaggedCache


class KangarooProposer(FirstBlocksProposer):
    """Drafts chains with the first blocks, the adapter and the target's head, by sampling or argmax.

    Args:
        adapter: Maps states that enter the exit layer to states that the head reads.
        head: The target's, or its rows of the drafter's vocabulary.
        head_weights: Of the head.
        dtype: Of the states that it reads.
        vocab_size: Rows of the target's own head.
        draft: `sampled`, or `greedy`: FIXED nodes at every temperature.
    """

    kind = "kangaroo"

    def __init__(
        self,
        adapter: Any,
        head: Product,
        *,
        head_weights: Weights,
        dtype: torch.dtype,
        exit_layer: int,
        vocabulary: DraftVocabulary,
        vocab_size: int,
        listener: ForwardListener | None = None,
        draft: str = "sampled",
    ) -> None:
        super().__init__(ChainDraft(vocabulary, vocab_size, draft), exit_layer=exit_layer)
        self.needs = TargetNeeds(hidden=(exit_layer,))
        self._adapter = _CachedAdapter(adapter, head, head_weights=head_weights, dtype=dtype, listener=listener)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Run the adapter over the prompts, on the states from the target's first blocks."""
        super().begin(contexts, seen)
        rows = [list(one.hidden_BTD[self._exit_layer][0]) if one.hidden_BTD else [] for one in seen]
        self._adapter.begin(rows)

    def read(self, inputs: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Run the adapter and the head."""
        return self._adapter.read(inputs)

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep committed text in the adapter's cache, and the states of committed tokens that it has not read."""
        kept = []
        for sequence, verdict in enumerate(verdicts):
            committed = [*self._unread[sequence], *(self._states[sequence][node] for node in verdict.path)]
            kept.append(min(self._adapter.num_pending[sequence], len(committed)))
            self._unread[sequence] = committed[kept[-1] :]
        self._adapter.keep(kept)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        super().drop(keep)
        self._adapter.drop(keep)


class _CachedAdapter:
    """The adapter with its own key-value cache, followed by the head."""

    def __init__(
        self,
        adapter: Any,
        head: Product,
        *,
        head_weights: Weights,
        dtype: torch.dtype,
        listener: ForwardListener | None,
    ) -> None:
        self._module = adapter
        self._head = head
        self._dtype = dtype
        self._listener = listener
        self._device = next(adapter.parameters()).device
        self._weights = weights_of(adapter, attention_width=adapter.width)
        self._head_weights = head_weights
        self._cache = RaggedCache(0)

    @property
    def num_pending(self) -> list[int]:
        """Tokens read since the last `keep`, by sequence."""
        return [length - kept for length, kept in zip(self._cache.lengths, self._cache.kept, strict=True)]

    def begin(self, rows: Sequence[Sequence[Tensor]]) -> None:
        """Empty the cache and read the states of prompts."""
        self._cache = RaggedCache(len(rows))
        if any(rows):
            span = Span(self._device)
            self._read(rows)
            self._report(rows, [0] * len(rows), head_rows=0, span=span)
        self._cache.commit()

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Read new states; return (states_ND, logits_NR) after the last one of each sequence that has any."""
        span = Span(self._device)
        lengths = self._cache.lengths
        states_BND = self._read(rows)
        chosen = [sequence for sequence, one in enumerate(rows) if one]
        last_ND = states_BND[chosen, [len(rows[sequence]) - 1 for sequence in chosen]].to(self._dtype)
        logits_NR = self._head(last_ND)
        self._report(rows, lengths, head_rows=len(chosen), span=span)
        return last_ND, logits_NR

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first `counts` pending tokens of every sequence."""
        if any(self.num_pending):
            self._cache.keep([range(count) for count in counts])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._cache.select(keep)

    @torch.no_grad()
    def _read(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """Read new states into the cache; return states_BND of the adapter."""
        sizes = [len(one) for one in rows]
        width = max(sizes)
        some = next(one[0] for one in rows if one)
        blank = some.new_zeros(width, len(some))
        exit_BND = torch.stack([torch.cat([torch.stack(list(one)), blank])[:width] if one else blank for one in rows])
        trees = [None] * len(rows)
        positions_BN = self._cache.positions(sizes, trees, width=width)
        allowed_BNC = self._cache.allowed(trees, width=width)
        if allowed_BNC is None:
            cached = self._cache.columns
            allowed_BNC = torch.ones(len(rows), width, cached + width, dtype=torch.bool).tril(cached)
        states_BND: Tensor = self._module(
            exit_BND, positions_BN.to(self._device), partial(self._attend, allowed_BNC.to(self._device))
        )
        self._cache.appended(sizes, width=width)
        return states_BND

    def _attend(self, allowed_BNC: Tensor, query_BHNd: Tensor, keys_BHNd: Tensor, values_BHNd: Tensor) -> Tensor:
        """Cache the new keys and values, and attend to the allowed ones among all."""
        keys_BHCd, values_BHCd = self._cache.hf.update(keys_BHNd, values_BHNd, 0)
        return scaled_dot_product_attention(query_BHNd, keys_BHCd, values_BHCd, attn_mask=allowed_BNC[:, None])

    def _report(self, rows: Sequence[Sequence[Tensor]], lengths: Sequence[int], *, head_rows: int, span: Span) -> None:
        """Report the call to the listener: the adapter's weights, its cache, and the head."""
        if self._listener is None:
            return
        shape = ForwardShape.of(list(map(len, rows)), lengths, num_layers=1, head_rows=head_rows)
        work = self._weights.read(shape.num_tokens, pairs=shape.pairs)
        if head_rows:
            work += self._head_weights.read(head_rows)
        work += Work(cache_bytes=self._cache.bytes_per_token() * (shape.context + shape.num_tokens))
        self._listener(ForwardEvent("drafter", shape, work, span.end(), prefill=not head_rows))
