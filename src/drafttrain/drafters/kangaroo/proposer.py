"""Drafting with the target's own first blocks: they run once per token, and the target continues from their states.

B = sequences, N = new rows of one call, C = cached rows, D = hidden, H = heads, d = width of a head,
V = the target's vocabulary, R = tokens that can be drafted, K = draft tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drafttrain.core.device_time import Span
from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent
from drafttrain.core.proposals import Budget, Context, DraftStep, LayerState, More, NodeKind, Proposal, Verdict, chain
from drafttrain.core.roles import FirstBlocks, ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.few_rows import Product
from drafttrain.drafters.next_tokens import next_tokens
from drafttrain.target_model.ragged_cache import RaggedCache


@dataclass
class _Chain:
    """The draft of one sequence, so far."""

    tokens: list[int]
    """The root, then the draft tokens."""
    states: list[Tensor]
    """By node, the state that enters the exit layer."""
    q_rows: list[Tensor] = field(default_factory=list)
    ended: bool = False
    """The length policy stopped it."""


class KangarooProposer:
    """Drafts chains with the first blocks, the adapter and the target's head, by sampling or argmax.

    The first blocks read every draft token, even the last one, because the target continues from the states of all nodes.
    The adapter reads a token only if another one is drafted after it.

    Args:
        adapter: Maps states that enter the exit layer to states that the head reads.
        head: The target's, or its rows of the drafter's vocabulary.
        head_bytes: Of its weights.
        dtype: Of the states that it reads.
        vocab_size: Rows of the target's own head.
        draft: `sampled`, or `greedy`: FIXED nodes at every temperature.
    """

    def __init__(
        self,
        adapter: Any,
        head: Product,
        *,
        head_bytes: int,
        dtype: torch.dtype,
        exit_layer: int,
        vocabulary: DraftVocabulary,
        vocab_size: int,
        listener: ForwardListener | None = None,
        draft: str = "sampled",
    ) -> None:
        self.needs = TargetNeeds(hidden=(exit_layer,))
        self._exit_layer = exit_layer
        self._adapter = _CachedAdapter(adapter, head, head_bytes=head_bytes, dtype=dtype, listener=listener)
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._greedy = draft == "greedy"
        self._fixed = self._greedy
        self._blocks: FirstBlocks | None = None
        self._contexts: list[Context] = []
        self._chains: list[_Chain] = []
        self._unread: list[list[Tensor]] = []
        """By sequence, the states of committed tokens that the adapter has not read yet."""

    def share(self, blocks: FirstBlocks) -> None:
        """Store the target's first blocks, split at the exit layer."""
        blocks.split_at(self._exit_layer)
        self._blocks = blocks

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Run the adapter over the prompts, on the states from the target's first blocks."""
        self._contexts = list(contexts)
        self._unread = [[] for _ in contexts]
        rows = [list(one.hidden_BTD[self._exit_layer][0]) if one.hidden_BTD else [] for one in seen]
        self._adapter.begin(rows)

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, with the states of its nodes."""
        if any(budget.width > 1 for budget in budgets):
            raise CheckpointError("a drafter of kind kangaroo drafts chains only: use a length policy of width 1")
        longest = [min(budget.nodes, budget.depth) for budget in budgets]
        self._fixed = self._greedy or sampling.temperature == 0
        roots = [context.tokens[-1:] for context in self._contexts]
        self._chains = [_Chain(root, [state]) for root, state in zip(roots, self._first_blocks(roots), strict=True)]
        inputs = [
            [*unread, *one.states] if most else []
            for unread, one, most in zip(self._unread, self._chains, longest, strict=True)
        ]
        for depth in range(1, max(longest, default=0) + 1):
            tokens = self._next_tokens(inputs, depth, sampling, generators, more)
            if not any(tokens):
                break
            inputs = [[] for _ in inputs]
            for sequence, state_D in enumerate(self._first_blocks(tokens)):
                if state_D is None:
                    continue
                self._chains[sequence].tokens += tokens[sequence]
                self._chains[sequence].states.append(state_D)
                if depth < longest[sequence] and not self._chains[sequence].ended:
                    inputs[sequence] = [state_D]
        return [self._proposal(one) for one in self._chains]

    def _next_tokens(
        self,
        inputs: Sequence[Sequence[Tensor]],
        depth: int,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[list[int]]:
        """Return the next draft token of each sequence, as a list of one or none."""
        tokens: list[list[int]] = [[] for _ in inputs]
        if not any(inputs):
            return tokens
        asked: dict[int, Tensor] = {}
        for sequence, found in enumerate(self._adapter.read(inputs)):
            if found is None:
                continue
            state_D, logits_R = found[0], self._vocabulary.logits(found[1])
            draft = self._chains[sequence]
            answer = more(DraftStep(sequence, depth, logits_R, state_D, draft.tokens[-1]))
            draft.ended = answer is not True
            if answer:
                asked[sequence] = logits_R
        drawn, drawn_from = next_tokens(
            list(asked.values()), sampling, [generators[i] for i in asked], fixed=self._fixed
        )
        for sequence, token, q_R in zip(asked, self._vocabulary.ids(drawn), drawn_from, strict=True):
            tokens[sequence] = [token]
            if q_R is not None:
                self._chains[sequence].q_rows.append(q_R)
        return tokens

    def _first_blocks(self, tokens: Sequence[Sequence[int]]) -> list[Any]:
        """Return the state of each sequence's new token; None where there is none."""
        assert self._blocks is not None, "the engine calls `share` before `begin`"
        states = self._blocks.run_first_blocks(tokens)
        return [one.hidden_ND[0] if len(one.hidden_ND) else None for one in states]

    def _proposal(self, one: _Chain) -> Proposal:
        if self._fixed or not one.q_rows:
            proposal = chain(one.tokens, kind=NodeKind.FIXED)
        else:
            q_rows_KV = self._vocabulary.over_target(torch.stack(one.q_rows), size=self._vocab_size)
            proposal = chain(one.tokens, kind=NodeKind.SAMPLED, q_rows_RV=q_rows_KV)
        return replace(proposal, resume=LayerState(self._exit_layer, torch.stack(one.states)))

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep committed text in the adapter's cache, and the states of committed tokens that it has not read."""
        kept = []
        for sequence, verdict in enumerate(verdicts):
            committed = [*self._unread[sequence], *(self._chains[sequence].states[node] for node in verdict.path)]
            kept.append(min(self._adapter.num_pending[sequence], len(committed)))
            self._unread[sequence] = committed[kept[-1] :]
        self._adapter.keep(kept)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._unread = [self._unread[i] for i in keep]
        self._adapter.drop(keep)


class _CachedAdapter:
    """The adapter with its own key-value cache, followed by the head."""

    def __init__(
        self, adapter: Any, head: Product, *, head_bytes: int, dtype: torch.dtype, listener: ForwardListener | None
    ) -> None:
        self._module = adapter
        self._head = head
        self._dtype = dtype
        self._listener = listener
        self._device = next(adapter.parameters()).device
        self._bytes = sum(p.numel() * p.element_size() for p in adapter.parameters())
        self._head_bytes = head_bytes
        self._cache = RaggedCache(0)

    @property
    def num_pending(self) -> list[int]:
        """Tokens read since the last `keep`, by sequence."""
        return [length - kept for length, kept in zip(self._cache.lengths, self._cache.kept, strict=True)]

    def begin(self, rows: Sequence[Sequence[Tensor]]) -> None:
        """Empty the cache and read the states of prompts."""
        self._cache = RaggedCache(len(rows))
        if any(rows):
            self._read(rows, head=False)
        self._cache.commit()

    def read(self, rows: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor] | None]:
        """Read new states; return (state, logits) of each sequence's last one; None where there is none."""
        return self._read(rows, head=True)

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first `counts` pending tokens of every sequence."""
        if any(self.num_pending):
            self._cache.keep([range(count) for count in counts])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._cache.select(keep)

    @torch.no_grad()
    def _read(self, rows: Sequence[Sequence[Tensor]], *, head: bool) -> list[tuple[Tensor, Tensor] | None]:
        span = Span(self._device)
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
        context = sum(length for length, size in zip(self._cache.lengths, sizes, strict=True) if size)
        states_BND = self._module(
            exit_BND, positions_BN.to(self._device), partial(self._attend, allowed_BNC.to(self._device))
        )
        self._cache.appended(sizes, width=width)
        found: list[tuple[Tensor, Tensor] | None] = [None] * len(rows)
        if head:
            chosen = [sequence for sequence, size in enumerate(sizes) if size]
            last_ND = states_BND[chosen, [sizes[sequence] - 1 for sequence in chosen]].to(self._dtype)
            logits_NR = self._head(last_ND)
            for row, sequence in enumerate(chosen):
                found[sequence] = (last_ND[row], logits_NR[row])
        self._report(sizes, context=context, head=head, span=span)
        return found

    def _attend(self, allowed_BNC: Tensor, query_BHNd: Tensor, keys_BHNd: Tensor, values_BHNd: Tensor) -> Tensor:
        """Cache the new keys and values, and attend to the allowed ones among all."""
        keys_BHCd, values_BHCd = self._cache.hf.update(keys_BHNd, values_BHNd, 0)
        return scaled_dot_product_attention(query_BHNd, keys_BHCd, values_BHCd, attn_mask=allowed_BNC[:, None])

    def _report(self, sizes: Sequence[int], *, context: int, head: bool, span: Span) -> None:
        """Report the call to the listener: the adapter's weights, its cache, and the head."""
        if self._listener is None:
            return
        num_tokens = sum(sizes)
        self._listener(
            ForwardEvent(
                model="drafter",
                num_tokens=num_tokens,
                context=context,
                num_sequences=sum(size > 0 for size in sizes),
                num_layers=1,
                bytes_read=self._bytes
                + (self._head_bytes if head else 0)
                + self._cache.bytes_per_token() * (context + num_tokens),
                span=span.end(),
                prefill=not head,
            )
        )
