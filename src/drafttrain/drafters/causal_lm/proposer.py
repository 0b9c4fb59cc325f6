"""The proposer of the independent drafter: a causal LM that drafts chains token by token, or trees level by level.

B = a batch of one, T = tokens of a call, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.causal_lm.layer_parallel import drafting_lm
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.tree_draft import TreeDraft, Trees
from drafttrain.target_model.ragged_cache import Tree


class DraftLM(Protocol):
    """A causal LM and the cache of the sequences that it reads, as `CachedLM` describes them."""

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache by sequence, including pending ones."""
        ...

    @property
    def kept(self) -> list[int]:
        """Tokens in the cache by sequence at the last `keep`."""
        ...

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens are read one at a time; None: they can be batched."""
        ...

    def begin(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Start new sequences after these prompts."""
        ...

    def forward(
        self, tokens: Sequence[Sequence[int]], *, parents: Sequence[Tree] | None = None, needs: TargetNeeds
    ) -> list[TargetOutput]:
        """Read new tokens of every sequence."""
        ...

    def keep(self, nodes: Sequence[Sequence[int]]) -> None:
        """Keep these of each sequence's pending tokens."""
        ...

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        ...


class LMProposer:
    """Drafts chains by sampling or argmax (the same at temperature 0), and dynamic trees, with any language model.

    Args:
        lm: The language model with its cache.
        rows: Of its head.
        target_vocab_size: Width of the rows of q.
        num_tokens: Ids that the tokenizer can produce; the drafter's other rows are padding and get no probability.
        draft: `sampled`, or `greedy`: FIXED nodes at every temperature, as vLLM drafts.
        only: The tokens that may be drafted; None: all.
    """

    needs = TargetNeeds()

    def __init__(
        self,
        lm: DraftLM,
        *,
        rows: int,
        target_vocab_size: int,
        num_tokens: int | None = None,
        draft: str = "sampled",
        only: Tensor | None = None,
    ) -> None:
        self._lm = lm
        vocabulary = DraftVocabulary(
            None, num_tokens=min(rows, target_vocab_size, num_tokens or target_vocab_size), only=only
        )
        self._chains = ChainDraft(vocabulary, target_vocab_size, draft)
        self._trees = TreeDraft(vocabulary, target_vocab_size, draft)
        self._contexts: list[Context] = []
        self._pending: list[int] = []
        """By sequence: how many committed tokens the last `propose` read. What it read after them are draft tokens."""
        self._branches = False
        """The last `propose` drafted trees."""
        self._reads: Sequence[Sequence[int | None]] = []
        """By sequence and node of its proposal, its number among the draft tokens that may have been read; None: it was not read."""

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences of up to `longest` tokens must be drafted one at a time; None: they can be batched."""
        return self._lm.why_one_at_a_time(longest)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read the prompts without their last tokens."""
        self._contexts = list(contexts)
        self._lm.begin([context.tokens[:-1] for context in contexts])

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, or one tree if the budgets are wider than 1."""
        # Committed tokens that the cache lacks: the root, and the last draft token if the whole chain was accepted.
        unread = [context.tokens[length:] for context, length in zip(self._contexts, self._lm.lengths, strict=True)]
        round_of = (self._contexts, budgets, sampling, generators, more)
        needs = TargetNeeds(logits=True, final=any(budget.states for budget in budgets))
        self._branches = any(budget.width > 1 for budget in budgets)
        if self._branches:
            return self._grown(self._trees.begin(*round_of), unread, needs)
        chains = self._chains.begin(*round_of)
        inputs = chains.where_growing(unread)
        self._pending = [len(tokens) for tokens in inputs]
        self._reads = [range(-1, budget.depth) for budget in budgets]
        while chains.growing:
            seen = self._lm.forward(inputs, needs=needs)
            chains.extend(*_last(seen, chains.growing))
            inputs = chains.inputs
        return chains.proposals()

    def _grown(self, trees: Trees, unread: Sequence[list[int]], needs: TargetNeeds) -> list[Proposal]:
        """Return one tree per sequence. A call reads the nodes of the frontiers, each of which attends to its own path."""
        inputs = trees.where_growing(unread)
        self._pending = pending = [len(tokens) for tokens in inputs]
        parents: list[list[int]] | None = None
        while trees.growing:
            seen = self._lm.forward(inputs, parents=parents, needs=needs)
            # Of the committed text only the last row is read: the root's.
            outputs = [(out, 1 if parents is None else len(own)) for out, own in zip(seen, inputs, strict=True) if own]
            trees.extend(
                torch.cat([out.logits_BTV[0, -count:] for out, count in outputs if out.logits_BTV is not None]),
                torch.cat([out.final_BTD[0, -count:] for out, count in outputs if out.final_BTD is not None])
                if needs.final
                else None,
            )
            frontiers = trees.frontiers
            inputs = [[node.token for node in own] for own in frontiers]
            parents = [[n + node.parent for node in own] for n, own in zip(pending, frontiers, strict=True)]
        self._reads = trees.reads()
        return trees.proposals()

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep committed tokens in the cache: those read before drafting, and the accepted draft tokens that were read.

        Nodes of a proposal that another proposer added come after its own.
        """
        read = [length - kept for length, kept in zip(self._lm.lengths, self._lm.kept, strict=True)]
        if any(read):
            self._lm.keep(
                [
                    [*range(pending), *(pending + place for place in places if place < count - pending)]
                    for count, pending, places in zip(read, self._pending, self._on_path(verdicts), strict=True)
                ]
            )

    def _on_path(self, verdicts: Sequence[Verdict]) -> list[list[int]]:
        """Return, by sequence, the number of each accepted draft token in the order of reading."""
        return [
            [place for node in verdict.path[1:] if node < len(reads) and (place := reads[node]) is not None]
            for reads, verdict in zip(self._reads, verdicts, strict=True)
        ]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._lm.drop(keep)


class ChainProposer(LMProposer):
    """Drafts with a Hugging Face causal LM, which has a cache of its own.

    Args:
        layer_parallel_size: Layers that read the same states while it drafts (`LayerParallelLM`); 1: none.
    """

    def __init__(
        self, model: Any, *, listener: ForwardListener | None = None, layer_parallel_size: int = 1, **options: Any
    ) -> None:
        rows = int(model.get_output_embeddings().weight.shape[0])
        lm = drafting_lm(model, layer_parallel_size=layer_parallel_size, listener=listener)
        super().__init__(lm, rows=rows, **options)
        self._own_lm = lm

    def continue_from(self, texts: Sequence[Sequence[int]], drafted: Sequence[Proposal]) -> None:
        """Continue from texts that need not begin with the committed ones: the cache is kept as far as the tokens agree.

        Args:
            texts: By sequence, the committed text as it is now.
            drafted: The proposals of the last round.
        """
        # The nodes of a tree are in the cache in the order of reading: they are dropped, and those accepted read again.
        if self._branches:
            self._lm.keep([range(count) for count in self._pending])
        agreeing = []
        for context, text, draft, cached in zip(self._contexts, texts, drafted, self._lm.lengths, strict=True):
            held = [*context.tokens[:-1], *draft.tokens_N.tolist()][:cached]
            # The last token is read again: the next round drafts from its logits.
            agreeing.append(min(agreement(held, text), len(text) - 1))
            context.tokens[:] = text
        self._own_lm.cut(agreeing)


def agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _last(seen: Sequence[TargetOutput], growing: Sequence[int]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return logits_1V after the last token of each growing sequence, and its states_1D if the call returned states."""
    outputs = [seen[sequence] for sequence in growing]
    logits = [output.logits_BTV[0, -1:] for output in outputs if output.logits_BTV is not None]
    states = [output.final_BTD[0, -1:] for output in outputs if output.final_BTD is not None]
    return logits, states or None
