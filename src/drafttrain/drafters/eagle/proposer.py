"""The proposer of EAGLE drafters: chains and dynamic trees for a list of sequences.

B = sequences, N = slots or draft tokens of one call (the longest sequence's), F = width of the target features,
D = hidden, R = the drafter's vocabulary, C = columns of the cache
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict, fixed_chain
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.eagle.cache import EagleCache
from drafttrain.drafters.eagle.decoding import DecodingEagle
from drafttrain.drafters.eagle.drafts import Draft, DraftChain, DraftTree, grow_chains
from drafttrain.drafters.eagle.model import EagleModel


class EagleProposer:
    """Drafts from the target's features of the committed text, then from its own states.

    The cache holds committed slots, each computed from the target's own features. A slot can be read once the token after
    it is known. So at the start of a round the last committed slot is unread; reading it gives the first draft token.

    Args:
        vocab_size: Width of the rows of q.
        num_tokens: Ids that the tokenizer can produce; the others get no probability.
        greedy: Chains are FIXED at every temperature: the argmax, as some engines draft.
    """

    def __init__(
        self,
        model: EagleModel,
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
        # On the host for looking up ids, on the device for mapping distributions to the target's ids.
        self._vocabulary_R = DraftVocabulary(model.vocabulary, num_tokens=num_tokens).ids_R.cpu()
        self._ids = self._vocabulary_R.tolist()
        self._vocabulary_on_device_R = self._vocabulary_R.to(device)
        self._bytes = model.weight_bytes()
        self._listener = listener
        self._greedy = greedy
        self._sampling = Sampling()
        self._contexts: list[Context] = []
        self._layer = DecodingEagle(model, device=device)
        self._unread: list[list[Tensor]] = []
        """By sequence, features_NF of committed slots that are not cached yet, in pieces."""

    @torch.no_grad()
    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read all slots of the prompts except the last."""
        self._contexts = list(contexts)
        self._layer.begin(len(contexts))
        self._unread = [[] for _ in contexts]
        self._store_features(seen, [len(context.tokens) - 1 for context in contexts])
        sizes = [max(0, _count(pieces) - 1) for pieces in self._unread]
        if any(sizes):
            span = Span(self._device)
            context = self._cached(sizes)
            self._read(sizes)
            self._report(sizes, context=context, fused=True, head=False, prefill=True, span=span)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, or one tree if its budget is wider than 1."""
        drafts: dict[int, Draft] = {}
        for number, (budget, pieces) in enumerate(zip(budgets, self._unread, strict=True)):
            # After a prompt of one token there are no features yet.
            if budget.nodes > 0 and budget.depth > 0 and pieces:
                drafts[number] = self._draft(number, budget, generators[number], more)
        if drafts:
            self._sampling = sampling
            self._grow_from_features(drafts)
            while any(draft.frontier for draft in drafts.values()):
                self._grow_from_drafts(drafts)
            self._layer.forget_drafts()
        return [
            drafts[number].proposal() if number in drafts else fixed_chain(context.tokens[-1], [])
            for number, context in enumerate(self._contexts)
        ]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Store the target's features of the accepted path. The draft tokens have left the cache already."""
        self._store_features(seen, [len(verdict.path) for verdict in verdicts])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._unread = [self._unread[i] for i in keep]
        self._layer.drop(keep)

    def _draft(
        self,
        number: int,
        budget: Budget,
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
            vocabulary_R=self._vocabulary_on_device_R,
            vocab_size=self._vocab_size,
            generator=generator,
            more=more,
        )

    def _grow_from_features(self, drafts: dict[int, Draft]) -> None:
        """Read the committed slots that are not cached yet; the state of the last one gives the first draft token."""
        span = Span(self._device)
        sizes = [_count(pieces) if number in drafts else 0 for number, pieces in enumerate(self._unread)]
        context = self._cached(sizes)
        states_BND = self._read(sizes)
        numbers = list(drafts)
        last_BD = self._rows(states_BND, [(number, sizes[number] - 1) for number in numbers])
        logits_BR = self._layer.head(last_BD)
        self._report(sizes, context=context, fused=True, head=True, prefill=False, span=span)
        self._grow(list(drafts.values()), [1] * len(drafts), logits_BR, last_BD)

    def _grow_from_drafts(self, drafts: dict[int, Draft]) -> None:
        """Read the frontiers of all drafts in one call."""
        span = Span(self._device)
        frontiers = [drafts[number].frontier if number in drafts else [] for number in range(len(self._contexts))]
        sizes = [len(frontier) for frontier in frontiers]
        context = self._cached(sizes) + self._layer.num_drafts(sizes)
        states_BND = self._layer.read_drafts(frontiers)
        rows = [(number, node) for number, size in enumerate(sizes) for node in range(size)]
        states_FD = self._rows(states_BND, rows)
        logits_FR = self._layer.head(states_FD)
        self._report(sizes, context=context, fused=False, head=True, prefill=False, span=span)
        growing = [number for number, size in enumerate(sizes) if size]
        self._grow([drafts[number] for number in growing], [sizes[number] for number in growing], logits_FR, states_FD)

    def _grow(self, drafts: Sequence[Draft], sizes: Sequence[int], logits_FR: Tensor, states_FD: Tensor) -> None:
        """Extend these drafts after their frontiers.

        Args:
            sizes: Rows of each draft in `logits_FR` and `states_FD`, in order.
        """
        chains = []
        first = 0
        for draft, size in zip(drafts, sizes, strict=True):
            if isinstance(draft, DraftTree):
                draft.grow(logits_FR[first : first + size], states_FD[first : first + size])
            else:
                assert isinstance(draft, DraftChain)
                chains.append((draft, first))
            first += size
        if not chains:
            return
        if len(chains) < len(logits_FR):
            index_N = torch.tensor([row for _, row in chains]).to(logits_FR.device)
            logits_FR, states_FD = logits_FR[index_N], states_FD[index_N]
        grow_chains(
            [chain for chain, _ in chains],
            logits_FR,
            states_FD,
            ids=self._ids,
            sampling=self._sampling,
            greedy=self._greedy,
        )

    def _rows(self, states_BND: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
        """Return the rows at (sequence, node): a slice if they are consecutive, else with one copy of the index."""
        width = states_BND.shape[1]
        flat = [number * width + node for number, node in places]
        if flat[-1] - flat[0] == len(flat) - 1:
            return states_BND.flatten(0, 1)[flat[0] : flat[-1] + 1]
        return states_BND.flatten(0, 1).index_select(0, torch.tensor(flat).to(states_BND.device))

    def _read(self, sizes: Sequence[int]) -> Tensor:
        """Read the first unread slots of every sequence into the cache; return states_BND."""
        features = [torch.cat(pieces) if size else None for pieces, size in zip(self._unread, sizes, strict=True)]
        tokens = [
            context.tokens[start + 1 : start + 1 + size]
            for context, start, size in zip(self._contexts, self._cache.lengths, sizes, strict=True)
        ]
        for row, (whole_NF, size) in enumerate(zip(features, sizes, strict=True)):
            if whole_NF is not None:
                self._unread[row] = [whole_NF[size:]] if len(whole_NF) > size else []
        some = next(whole_NF for whole_NF in features if whole_NF is not None)
        first = [
            some[:0] if whole_NF is None else whole_NF[:size] for whole_NF, size in zip(features, sizes, strict=True)
        ]
        return self._layer.read_slots(tokens, pad_sequence(first, batch_first=True))

    def _store_features(self, seen: Sequence[TargetOutput], sizes: Sequence[int]) -> None:
        """Append the features of the first `size` tokens of every sequence to the unread ones."""
        for pieces, output, size in zip(self._unread, seen, sizes, strict=True):
            if size:
                pieces.append(self._model.features(output)[0, :size])

    @property
    def _cache(self) -> EagleCache:
        return self._layer.cache

    def _cached(self, sizes: Sequence[int]) -> int:
        """Return the committed slots of the sequences that a call reads."""
        return sum(length for length, size in zip(self._cache.lengths, sizes, strict=True) if size)

    def _report(
        self, sizes: Sequence[int], *, context: int, fused: bool, head: bool, prefill: bool, span: Span
    ) -> None:
        """Report one call to the listener: the layer, and the head and the fusion if they ran."""
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
