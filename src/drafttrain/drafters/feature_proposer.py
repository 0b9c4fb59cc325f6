"""A drafter that reads the target's features, at inference: chains and dynamic trees for a list of sequences.

B = sequences, N = slots or draft tokens of one call (the longest sequence's), F = width of what is read of the target,
D = hidden, R = the drafter's vocabulary, C = columns of the cache
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drafttrain.core.device_time import Span
from drafttrain.core.records import (
    Budget,
    Context,
    DraftStep,
    ForwardEvent,
    More,
    Proposal,
    Sampling,
    TargetOutput,
    Verdict,
    fixed_chain,
)
from drafttrain.core.roles import ForwardListener
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.feature_cache import FeatureCache
from drafttrain.drafters.feature_drafts import Draft, DraftChain, DraftNode, DraftTree
from drafttrain.drafters.feature_layer import attend
from drafttrain.drafters.feature_rollout import FeatureModel


class FeatureProposer:
    """Drafts from the target's features of the committed text, then from its own states.

    The cache holds committed slots only, each computed from the target's true features; a slot is read when the token after it
    is known. The last committed slot is always unread when a round begins: reading it gives the first draft token.

    Args:
        vocab_size: Width of the rows of q.
        num_tokens: Ids that the tokenizer can produce; the others carry no mass.
        greedy: Chains at temperature > 0 are FIXED, by the likeliest token, as some engines draft.
    """

    def __init__(
        self,
        model: FeatureModel,
        *,
        vocab_size: int,
        num_tokens: int,
        device: torch.device,
        listener: ForwardListener | None = None,
        greedy: bool = False,
    ) -> None:
        self.needs = model.needs()
        self._model = model
        self._vocab_size = vocab_size
        self._device = device
        self._vocabulary_R = DraftVocabulary(model.vocabulary, num_tokens=num_tokens).ids_R.to(device)
        self._bytes = model.weight_bytes()
        self._listener = listener
        self._greedy = greedy
        self._contexts: list[Context] = []
        self._cache = FeatureCache(0)
        self._unread: list[list[Tensor]] = []
        """By sequence, features_NF of the committed slots that the cache lacks, in pieces."""

    @torch.no_grad()
    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read the prompts' slots but the last."""
        self._contexts = list(contexts)
        self._cache = FeatureCache(len(contexts))
        self._unread = [[] for _ in contexts]
        self._note(seen, [len(context.tokens) - 1 for context in contexts])
        sizes = [max(0, _count(pieces) - 1) for pieces in self._unread]
        if any(sizes):
            span = Span(self._device)
            context = self._cached(sizes)
            self._read(sizes)
            self._tell(sizes, context=context, fused=True, head=False, prefill=True, span=span)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain, or where the budget is wider one tree, a sequence."""
        drafts: dict[int, Draft] = {}
        for number, (budget, pieces) in enumerate(zip(budgets, self._unread, strict=True)):
            # After a prompt of one token there is nothing yet to draft from.
            if budget.nodes > 0 and budget.depth > 0 and pieces:
                drafts[number] = self._draft(number, budget, sampling, generators[number], more)
        if drafts:
            self._grow_from_features(drafts)
            ancestors: dict[int, list[list[int]]] = {number: [] for number in drafts}
            while any(draft.frontier for draft in drafts.values()):
                self._grow_from_drafts(drafts, ancestors)
            self._cache.forget_drafts()
        return [
            drafts[number].proposal() if number in drafts else fixed_chain(context.tokens[-1], [])
            for number, context in enumerate(self._contexts)
        ]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Note the target's features of the accepted path; the states that drafting fed on are forgotten already."""
        self._note(seen, [len(verdict.path) for verdict in verdicts])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._unread = [self._unread[i] for i in keep]
        self._cache.select(keep)

    def _draft(
        self,
        number: int,
        budget: Budget,
        sampling: Sampling,
        generator: torch.Generator,
        more: Callable[[DraftStep], bool | More],
    ) -> Draft:
        root = self._contexts[number].tokens[-1]
        if budget.width > 1:
            return DraftTree(root, budget, sequence=number, vocabulary_R=self._vocabulary_R, more=more)
        return DraftChain(
            root,
            budget,
            sequence=number,
            vocabulary_R=self._vocabulary_R,
            vocab_size=self._vocab_size,
            sampling=sampling,
            greedy=self._greedy,
            generator=generator,
            more=more,
        )

    def _grow_from_features(self, drafts: dict[int, Draft]) -> None:
        """Read the committed slots that the cache lacks; the last one's state gives the first draft token."""
        span = Span(self._device)
        sizes = [_count(pieces) if number in drafts else 0 for number, pieces in enumerate(self._unread)]
        context = self._cached(sizes)
        states_BND = self._read(sizes)
        numbers = list(drafts)
        last_BD = states_BND[numbers, [sizes[number] - 1 for number in numbers]]
        logits_BR = self._model.head(last_BD, 1)
        self._tell(sizes, context=context, fused=True, head=True, prefill=False, span=span)
        for row, draft in enumerate(drafts.values()):
            draft.grow(logits_BR[row : row + 1], last_BD[row : row + 1])

    def _grow_from_drafts(self, drafts: dict[int, Draft], ancestors: dict[int, list[list[int]]]) -> None:
        """Read the frontiers of all drafts in one call."""
        span = Span(self._device)
        frontiers = [drafts[number].frontier if number in drafts else [] for number in range(len(self._contexts))]
        sizes = [len(frontier) for frontier in frontiers]
        context = self._cached(sizes) + sum(len(ancestors[number]) for number in drafts if sizes[number])
        states_BND = self._read_drafts(frontiers, ancestors)
        rows = [(number, node) for number, size in enumerate(sizes) for node in range(size)]
        states_FD = states_BND[[number for number, _ in rows], [node for _, node in rows]]
        depth = max(frontier[0].depth for frontier in frontiers if frontier) + 1
        logits_FR = self._model.head(states_FD, depth)
        self._tell(sizes, context=context, fused=False, head=True, prefill=False, span=span)
        first = 0
        for number, size in enumerate(sizes):
            if size:
                drafts[number].grow(logits_FR[first : first + size], states_FD[first : first + size])
            first += size

    def _read(self, sizes: Sequence[int]) -> Tensor:
        """Read the first unread slots of every sequence into the cache; return states_BND."""
        width = max(sizes)
        starts = list(self._cache.lengths)
        template = next(piece for pieces in self._unread for piece in pieces)
        features_BNF = template.new_zeros(len(sizes), width, template.shape[-1])
        tokens_BN = torch.zeros(len(sizes), width, dtype=torch.long)
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if size:
                whole_NF = torch.cat(self._unread[row])
                features_BNF[row, :size] = whole_NF[:size]
                tokens_BN[row, :size] = torch.tensor(self._contexts[row].tokens[start + 1 : start + 1 + size])
                self._unread[row] = [whole_NF[size:]] if len(whole_NF) > size else []
        positions_BN = (torch.tensor(starts)[:, None] + torch.arange(width)).to(self._device)
        hidden_BND = self._model.fused(features_BNF)
        inputs_BNX, residual_BND = self._model.entering(self._model.embed(tokens_BN.to(self._device)), hidden_BND)
        query, key, value = self._model.layer.project(inputs_BNX, positions_BN)
        columns = self._cache.commit(key, value, sizes)
        allowed_BNC = self._cache.committed_before(starts, width=width).to(self._device)
        return self._model.layer.finish(attend(query, *columns, allowed_BNC), residual_BND)

    def _read_drafts(self, frontiers: Sequence[Sequence[DraftNode]], ancestors: dict[int, list[list[int]]]) -> Tensor:
        """Read draft tokens behind the committed slots, each seeing its own path; return states_BND.

        Args:
            ancestors: By sequence and node in the order of reading, the draft columns of its path, its own included.
        """
        width, lengths = max(map(len, frontiers)), self._cache.lengths
        example_D = next(node.state_D for frontier in frontiers for node in frontier)
        hidden_BND = example_D.new_zeros(len(frontiers), width, len(example_D))
        tokens_BN = torch.zeros(len(frontiers), width, dtype=torch.long)
        positions_BN = torch.zeros(len(frontiers), width, dtype=torch.long)
        first = self._cache.num_draft_columns
        path_BNP = torch.zeros(len(frontiers), width, first + width, dtype=torch.bool)
        for row, frontier in enumerate(frontiers):
            before = list(ancestors.get(row, ()))
            for place, node in enumerate(frontier):
                hidden_BND[row, place] = node.state_D
                tokens_BN[row, place] = node.token
                positions_BN[row, place] = lengths[row] - 1 + node.depth
                path = [*(before[node.parent] if node.parent >= 0 else ()), first + place]
                path_BNP[row, place, path] = True
                ancestors[row].append(path)
        hidden_BND = self._model.fed_back(hidden_BND)
        inputs_BNX, residual_BND = self._model.entering(self._model.embed(tokens_BN.to(self._device)), hidden_BND)
        query, key, value = self._model.layer.project(inputs_BNX, positions_BN.to(self._device))
        columns = self._cache.add_drafts(key, value)
        text_BNC = self._cache.committed_before([length - 1 for length in lengths], width=1).expand(-1, width, -1)
        # Padding, which nobody reads, looks at the first draft column: a softmax needs something.
        path_BNP[..., 0] |= ~path_BNP.any(dim=-1)
        allowed_BNC = torch.cat([text_BNC, path_BNP], dim=-1).to(self._device)
        return self._model.layer.finish(attend(query, *columns, allowed_BNC), residual_BND)

    def _note(self, seen: Sequence[TargetOutput], sizes: Sequence[int]) -> None:
        for pieces, output, size in zip(self._unread, seen, sizes, strict=True):
            if size:
                pieces.append(self._model.features(output)[0, :size])

    def _cached(self, sizes: Sequence[int]) -> int:
        """Return the committed slots of the sequences that a call reads."""
        return sum(length for length, size in zip(self._cache.lengths, sizes, strict=True) if size)

    def _tell(
        self, sizes: Sequence[int], *, context: int, fused: bool, head: bool, prefill: bool, span: Span
    ) -> None:
        """Tell the ledger of one call: the layer once, the head and what fuses features where they ran."""
        if self._listener is None:
            return
        fusion, layer, head_bytes, row = self._bytes
        num_tokens = sum(sizes)
        weights = layer + (fusion if fused else 0) + (head_bytes if head else 0) + row * num_tokens
        self._listener(
            ForwardEvent(
                model="drafter",
                num_tokens=num_tokens,
                context=context,
                num_sequences=sum(size > 0 for size in sizes),
                num_layers=1,
                bytes_read=weights + self._cache.bytes_per_slot() * (context + num_tokens),
                span=span.end(),
                prefill=prefill,
            )
        )


def _count(pieces: Sequence[Tensor]) -> int:
    return sum(len(piece) for piece in pieces)
