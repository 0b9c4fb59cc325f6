"""Medusa's proposer: one call of the heads per round, on the target's state before the root, gives a chain or a tree.

V = the target's vocabulary, R = tokens that can be drafted, D = hidden, K = heads, M = sequences that draft
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from drafttrain.core.device_time import Span
from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict, fixed_tree
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.core.weights import weights_of
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.medusa.decoding import DecodingHeads
from drafttrain.drafters.medusa.static_tree import Path, within
from drafttrain.drafters.tree_draft import TreeDraft


class MedusaHeads(Protocol):
    """What drafting needs of the heads."""

    num_heads: int
    vocab_size: int
    draft: str
    paths: list[Path] | None
    blocks: nn.ModuleList
    lm_heads: nn.ModuleList
    token_map: Tensor | None

    def decoding_heads(self) -> DecodingHeads:
        """Return the heads as decoding calls them."""
        ...


class MedusaProposer:
    """Head d predicts the token d places after the root, whatever stands between. So drafting needs no cache.

    A chain is the argmax of each head (FIXED), or at temperature > 0 a draw from each head (SAMPLED). A tree
    without a form takes the best guesses of each head along the calibrated paths (FIXED).

    Args:
        num_tokens: Ids that the tokenizer can produce; rows of the heads for others are padding and get no probability.
    """

    needs = TargetNeeds(final=True)

    def __init__(self, heads: MedusaHeads, *, num_tokens: int, listener: ForwardListener | None = None) -> None:
        self._heads = heads
        self._decoding = heads.decoding_heads()
        self._vocabulary = DraftVocabulary(heads.token_map, num_tokens=num_tokens)
        self._draft = ChainDraft(self._vocabulary, heads.vocab_size, heads.draft)
        self._tree_draft = TreeDraft(self._vocabulary, heads.vocab_size, heads.draft)
        self._listener = listener
        self._contexts: list[Context] = []
        self._states: list[Tensor | None] = []
        """By sequence, the target's state of the token before the root; None: the root is the first token."""

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Store the target's state of the last token before each root."""
        self._contexts = list(contexts)
        self._states = [_last(output) for output in seen]

    @torch.no_grad()
    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain or tree per sequence."""
        # Before the first token of a text there is no state to draft from.
        budgets = [
            budget.within(0 if state is None else self._heads.num_heads)
            for budget, state in zip(budgets, self._states, strict=True)
        ]
        logits = self._logits(budgets)
        round_of = (self._contexts, budgets, sampling, generators, more)
        if any(budget.form is not None and budget.width > 1 for budget in budgets):
            trees = self._tree_draft.begin(*round_of)
            while trees.growing:
                trees.extend(torch.stack([logits[sequence][depth] for sequence, depth in trees.open]))
            return trees.proposals()
        if any(budget.width > 1 for budget in budgets):
            return [
                self._tree(sequence, logits.get(sequence, []), budget, more) for sequence, budget in enumerate(budgets)
            ]
        chains = self._draft.begin(*round_of)
        chains.extend([torch.stack(logits[sequence]) for sequence in chains.growing])
        return chains.proposals()

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Store the state of the last accepted node: the target's token after it is the next root."""
        self._states = [_last(output) for output in seen]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._states = [self._states[i] for i in keep]

    def _logits(self, budgets: Sequence[Budget]) -> dict[int, list[Tensor]]:
        """Return, by sequence that drafts, the logits of every head within its budget."""
        depths = {sequence: budget.depth for sequence, budget in enumerate(budgets) if budget.nodes}
        if not depths:
            return {}
        deepest = max(depths.values())
        span = Span(next(self._heads.blocks.parameters()).device)
        final_MD = torch.stack([state for i, state in enumerate(self._states) if i in depths and state is not None])
        by_head = [self._vocabulary.logits(logits_MW) for logits_MW in self._decoding(final_MD, deepest)]
        found = {
            sequence: [logits_MR[row] for logits_MR in by_head[:depth]]
            for row, (sequence, depth) in enumerate(depths.items())
        }
        if self._listener is not None:
            self._listener(self._event(len(depths), deepest, span.end()))
        return found

    def _tree(
        self, sequence: int, logits_by_head: list[Tensor], budget: Budget, more: Callable[[DraftStep], bool | More]
    ) -> Proposal:
        if self._heads.paths is None:
            raise CheckpointError(
                "these Medusa heads have no medusa_tree.json, so they draft chains only: use eval.length of kind fixed, "
                "or heads that drafttrain exported"
            )
        logits_by_head = logits_by_head[: _wanted(sequence, logits_by_head, more)]
        paths = within(self._heads.paths, nodes=budget.nodes, depth=len(logits_by_head), width=budget.width)
        guesses = (
            self._vocabulary.best(torch.stack(logits_by_head), count=min(budget.width, len(logits_by_head[0]))).tolist()
            if logits_by_head
            else []
        )
        place: dict[Path, int] = {(): 0} | {path: number for number, path in enumerate(paths, start=1)}
        root = self._contexts[sequence].tokens[-1]
        return fixed_tree(root, [(guesses[len(path) - 1][path[-1]], place[path[:-1]]) for path in paths])

    def _event(self, num_sequences: int, depth: int, span: Span) -> ForwardEvent:
        blocks, heads = self._heads.blocks[:depth], self._heads.lm_heads[:depth]
        shape = ForwardShape(
            num_tokens=num_sequences,
            context=0,
            pairs=0,
            num_sequences=num_sequences,
            num_layers=depth,
            head_rows=depth * num_sequences,
        )
        work = weights_of(blocks).read(num_sequences) + weights_of(heads).read(shape.head_rows // len(heads))
        return ForwardEvent("drafter", shape, work, span)


def _wanted(sequence: int, logits_by_head: Sequence[Tensor], more: Callable[[DraftStep], bool | More]) -> int:
    """Return how many levels of a tree the length policy wants."""
    for level, logits_R in enumerate(logits_by_head, start=1):
        answer = more(DraftStep(sequence, level, logits_R))
        if answer is not True:
            return level if answer else level - 1
    return len(logits_by_head)


def _last(output: TargetOutput) -> Tensor | None:
    """Return the target's state of the last token that was read; None where none was."""
    final_BTD = output.final_BTD
    return None if final_BTD is None or not final_BTD.shape[1] else final_BTD[0, -1]
