"""The proposer of the independent drafter: a causal LM that drafts chains token by token, or trees level by level.

B = a batch of one, T = tokens of a call, M = nodes of the frontier, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.drafters.causal_lm.decoding import decoding_lm
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.dynamic_tree import DynamicTree


class ChainProposer:
    """Drafts chains by sampling or argmax (the same at temperature 0), and dynamic trees.

    Args:
        target_vocab_size: Width of the rows of q.
        num_tokens: Ids that the tokenizer can produce; the drafter's other rows are padding and get no probability.
        draft: `sampled`, or `greedy`: FIXED nodes at every temperature, as vLLM drafts.
        only: The tokens that may be drafted; None: all.
    """

    needs = TargetNeeds()

    def __init__(
        self,
        model: Any,
        *,
        target_vocab_size: int,
        num_tokens: int | None = None,
        listener: ForwardListener | None = None,
        draft: str = "sampled",
        only: Tensor | None = None,
    ) -> None:
        self._lm = decoding_lm(model, listener=listener)
        rows = int(model.get_output_embeddings().weight.shape[0])
        self._vocabulary = DraftVocabulary(
            None, num_tokens=min(rows, target_vocab_size, num_tokens or target_vocab_size), only=only
        )
        self._draft = ChainDraft(self._vocabulary, target_vocab_size, draft)
        self._contexts: list[Context] = []
        self._pending: list[int] = []
        """By sequence: how many committed tokens the last `propose` read. What it read after them are draft tokens."""

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
        if any(budget.width > 1 for budget in budgets):
            return self._trees(budgets, more)
        chains = self._draft.begin(self._contexts, budgets, sampling, generators, more)
        # Committed tokens that the cache lacks: the root, and the last draft token if the whole chain was accepted.
        inputs = chains.where_growing(self._unread())
        self._pending = [len(tokens) for tokens in inputs]
        needs = TargetNeeds(logits=True, final=any(budget.states for budget in budgets))
        while chains.growing:
            seen = self._lm.forward(inputs, needs=needs)
            chains.extend(*_last(seen, chains.growing))
            inputs = chains.inputs
        return chains.proposals()

    def _unread(self) -> list[list[int]]:
        """Return, by sequence, the committed tokens that the cache lacks."""
        return [context.tokens[length:] for context, length in zip(self._contexts, self._lm.lengths, strict=True)]

    def _trees(self, budgets: Sequence[Budget], more: Callable[[DraftStep], bool | More]) -> list[Proposal]:
        """Return one FIXED tree per sequence, with one call per level.

        Nodes that stay pending in the cache would be visible to all nodes of the next call. So every level reads the whole
        tree again, and only committed text stays in the cache.
        """
        trees = [DynamicTree(c.tokens[-1], budget) for c, budget in zip(self._contexts, budgets, strict=True)]
        inputs = [tokens if tree.frontier else [] for tokens, tree in zip(self._unread(), trees, strict=True)]
        if not any(inputs):
            return [tree.proposal() for tree in trees]
        seen = self._lm.forward(inputs)
        self._lm.keep([range(len(tokens)) for tokens in inputs])
        # The root is cached now, so the calls below read the tree from node 1.
        rows = [[len(tokens) - 1] for tokens in inputs]
        while True:
            for sequence, (tree, output) in enumerate(zip(trees, seen, strict=True)):
                if tree.frontier:
                    _grow(tree, output, rows[sequence], sequence, more, vocabulary=self._vocabulary)
            if not any(tree.frontier for tree in trees):
                return [tree.proposal() for tree in trees]
            rows = [[node - 1 for node in tree.frontier] for tree in trees]
            seen = self._lm.forward(
                [tree.tokens[1:] if tree.frontier else [] for tree in trees],
                parents=[[max(p - 1, -1) for p in tree.parents[1:]] if tree.frontier else [] for tree in trees],
            )
            self._lm.keep([[] for _ in trees])

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep committed tokens in the cache: those read before drafting, and the accepted draft tokens that were read.

        Node i of a chain was read as the i-th token after those. Nodes of a proposal that another proposer added come later.
        """
        read = [length - kept for length, kept in zip(self._lm.lengths, self._lm.kept, strict=True)]
        if any(read):
            self._lm.keep(
                [
                    range(pending + sum(node <= count - pending for node in verdict.path[1:]))
                    for count, pending, verdict in zip(read, self._pending, verdicts, strict=True)
                ]
            )

    def continue_from(self, texts: Sequence[Sequence[int]], drafted: Sequence[Proposal]) -> None:
        """Continue from texts that need not begin with the committed ones: the cache is kept as far as the tokens agree.

        Args:
            texts: By sequence, the committed text as it is now.
            drafted: The proposals of the last round.
        """
        agreeing = []
        for context, text, draft, cached in zip(self._contexts, texts, drafted, self._lm.lengths, strict=True):
            # Of a tree nothing is cached but the text before it.
            held = [*context.tokens[:-1], *draft.tokens_N.tolist()][:cached]
            # The last token is read again: the next round drafts from its logits.
            agreeing.append(min(agreement(held, text), len(text) - 1))
            context.tokens[:] = text
        self._lm.cut(agreeing)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._lm.drop(keep)


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


def _grow(
    tree: DynamicTree,
    output: TargetOutput,
    rows: list[int],
    sequence: int,
    more: Callable[[DraftStep], bool | More],
    *,
    vocabulary: DraftVocabulary,
) -> None:
    """Add the children of a tree's frontier, whose logits are these rows of a call."""
    assert output.logits_BTV is not None
    # A contiguous range needs no index on the device.
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    logits_MV = vocabulary.logits(output.logits_BTV[0, slice(rows[0], rows[-1] + 1) if together else rows])
    expand = [
        bool(more(DraftStep(sequence, tree.depth + 1, logits_V, token=tree.tokens[node])))
        for node, logits_V in zip(tree.frontier, logits_MV, strict=True)
    ]
    tree.grow(logits_MV.float().log_softmax(dim=-1), expand)
