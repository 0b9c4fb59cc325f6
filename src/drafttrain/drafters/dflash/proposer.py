"""The proposer of block drafters: one pass over [root, mask, ...] a round, for a list of sequences.

S = sequences, M = sequences that draft, N = new positions of one call, B = slots of a block, K = draft tokens of a block,
F = width of the target's features, D = hidden, R = the drafter's vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape, Work
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.core.weights import Weights
from drafttrain.drafters.chain_draft import ChainDraft, Chains
from drafttrain.drafters.dflash.cache import ContextCache
from drafttrain.drafters.dflash.layer import Attend
from drafttrain.drafters.few_rows import Product
from drafttrain.drafters.tree_draft import TreeDraft, Trees


class BlockModel(Protocol):
    """What drafting needs of a block drafter."""

    block_size: int
    causal: bool
    draft: str

    @property
    def num_depths(self) -> int:
        """Draft tokens of a block."""
        ...

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        ...

    @property
    def vocabulary(self) -> Tensor | None:
        """The target's id of each token in the drafter's vocabulary; None: the vocabularies are the same."""
        ...

    def needs(self) -> TargetNeeds:
        """Return what is read from the target."""
        ...

    def features(self, seen: TargetOutput) -> Tensor:
        """Return features_SNF from the target's outputs."""
        ...

    def context(self, features_SNF: Tensor, positions_SN: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, by layer, keys and values of positions whose features are known."""
        ...

    def block_states(self, roots_S: Tensor, positions_S: Tensor, attend: Sequence[Attend]) -> Tensor:
        """Return states_SBD of blocks."""
        ...

    def predicting(self, states_SBD: Tensor) -> Tensor:
        """Return the states_SKD that predict the tokens after the root."""
        ...

    def decoding_head(self) -> Product:
        """Return the head, with its weights prepared once."""
        ...

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the context, a block, the head), and the bytes of one embedding row."""
        ...


class BlockProposer:
    """Drafts a chain, or a tree of the slots' tokens. Only the context is kept between rounds; of a block nothing is.

    The context of position j is computed when the target has read token j: the prompt without its last token, then the root and
    the accepted tokens of each round. So the root is the first token whose features do not exist yet.

    A block has the size of training, whatever the budget: where its slots attend to each other, their number changes the first
    one. The budget only cuts the chain.
    """

    def __init__(
        self,
        model: BlockModel,
        *,
        vocab_size: int,
        num_tokens: int,
        device: torch.device,
        listener: ForwardListener | None = None,
    ) -> None:
        self.needs = model.needs()
        self._model = model
        self._device = device
        self._listener = listener
        self._head = model.decoding_head()
        self._weights = model.decoding_weights()
        self._vocabulary = DraftVocabulary(model.vocabulary, num_tokens=num_tokens)
        self._draft = ChainDraft(self._vocabulary, vocab_size, model.draft)
        self._tree_draft = TreeDraft(self._vocabulary, vocab_size, model.draft)
        self._contexts: list[Context] = []
        self._cache = ContextCache(model.num_layers, 0)
        self._unread: list[list[Tensor]] = []
        """By sequence, features_NF of positions that are not in the cache yet, in pieces."""

    @torch.no_grad()
    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Compute the context of the prompts."""
        self._contexts = list(contexts)
        self._cache = ContextCache(self._model.num_layers, len(contexts))
        self._unread = [[] for _ in contexts]
        self._store_features(seen, [len(context.tokens) - 1 for context in contexts])
        span = Span(self._device)
        if num_read := self._read_context():
            self._report(num_read, blocks=0, head_rows=0, span=span)

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, or one tree if its budget is wider than 1."""
        budgets = [budget.within(self._model.num_depths) for budget in budgets]
        round_of = (self._contexts, budgets, sampling, generators, more)
        chains = self._draft.begin(*round_of)
        if not chains.growing:
            return chains.proposals()
        span = Span(self._device)
        num_read = self._read_context()
        states_SKD = self._block_states()[:, : max(budget.depth for budget in budgets)]
        self._report(num_read, blocks=len(budgets), head_rows=states_SKD[..., 0].numel(), span=span)
        if any(budget.width > 1 for budget in budgets):
            trees = self._tree_draft.begin(*round_of)
            self.extend_trees(trees, states_SKD)
            return trees.proposals()
        self.extend(chains, states_SKD)
        return chains.proposals()

    def extend(self, chains: Chains, states_SKD: Tensor) -> None:
        """Draft the chains from the states of their blocks: here all tokens of a chain at once.

        A kind whose tokens depend on each other calls `chains.extend` once for each place instead.
        """
        states_MKD = self.of_growing(chains, states_SKD)
        chains.extend(self._head(states_MKD), states_MKD)

    def extend_trees(self, trees: Trees, states_SKD: Tensor) -> None:
        """Draft the trees from the states of the blocks: here all nodes of a level have the distribution of one slot.

        Source of such trees: JetSpec, arXiv 2606.18394.
        """
        trees.extend_to_the_end(self._head(states_SKD), states_SKD)

    def of_growing(self, chains: Chains, values_S: Tensor) -> Tensor:
        """Return the rows of the sequences whose chains grow."""
        growing = chains.growing
        if len(growing) == len(values_S):
            return values_S
        return values_S.index_select(0, torch.tensor(growing).to(values_S.device))

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Store the target's features of the root and of the accepted tokens."""
        self._store_features(seen, [len(verdict.path) for verdict in verdicts])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._unread = [self._unread[i] for i in keep]
        self._cache.select(keep)

    def _read_context(self) -> int:
        """Append all unread positions to the cache; return how many there were."""
        sizes = [sum(map(len, pieces)) for pieces in self._unread]
        if not any(sizes):
            return 0
        some = next(piece for pieces in self._unread for piece in pieces)
        rows = [torch.cat(pieces) if pieces else some[:0] for pieces in self._unread]
        features_SNF = pad_sequence(rows, batch_first=True)
        starts_S = torch.tensor(self._cache.lengths).to(self._device)
        positions_SN = starts_S[:, None] + torch.arange(max(sizes), device=self._device)
        self._cache.append(self._model.context(features_SNF, positions_SN), sizes)
        self._unread = [[] for _ in self._unread]
        return sum(sizes)

    def _block_states(self) -> Tensor:
        """Return states_SKD of a block at the root of every sequence."""
        lengths = self._cache.lengths
        assert lengths == [len(context.tokens) - 1 for context in self._contexts], "the context ends before the root"
        # One copy to the device for both.
        roots_S, positions_S = torch.tensor([[one.tokens[-1] for one in self._contexts], lengths]).to(self._device)
        attend = self._cache.attend(positions_S, self._model.block_size, causal=self._model.causal)
        return self._model.predicting(self._model.block_states(roots_S, positions_S, attend))

    def _store_features(self, seen: Sequence[TargetOutput], sizes: Sequence[int]) -> None:
        """Append the features of the first `size` tokens of every sequence to the unread ones."""
        for pieces, output, size in zip(self._unread, seen, sizes, strict=True):
            if size:
                pieces.append(self._model.features(output)[0, :size])

    def _report(self, num_read: int, *, blocks: int, head_rows: int, span: Span) -> None:
        """Report one pass to the listener: new positions of the context, and blocks, whose slots attend to each other."""
        if self._listener is None:
            return
        of_context, of_block, of_head, row = self._weights
        columns, slots = sum(self._cache.lengths), self._model.block_size
        shape = ForwardShape(
            num_tokens=num_read + blocks * slots,
            context=columns - num_read,
            pairs=slots * (columns + blocks * slots) if blocks else 0,
            num_sequences=len(self._contexts),
            num_layers=self._model.num_layers,
            head_rows=head_rows,
        )
        work = of_context.read(num_read) if num_read else Work()
        if blocks:
            work += of_block.read(blocks * slots, pairs=shape.pairs) + of_head.read(head_rows)
        cached = self._cache.bytes_per_column() * (columns if blocks else num_read)
        work += Work(row_bytes=2 * row * blocks, cache_bytes=cached)
        self._listener(ForwardEvent("drafter", shape, work, span.end(), prefill=not blocks))
