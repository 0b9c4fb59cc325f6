"""What a drafter drafted in its own tokens, as a proposal in the target's: shared tokens, or the text encoded again.

R = rows of q, W = the drafter's vocabulary, V = the target's
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch

from drafttrain.core.proposals import Budget, Context, Proposal, fixed_tree
from drafttrain.target_model.other_tokenizer import OtherTokenizer


class Translation(Protocol):
    """Makes proposals in the target's tokens."""

    def token(self, own: int) -> int | None:
        """Return the target's id of an own token; None: it has none."""
        ...

    def proposal(self, context: Context, budget: Budget, draft: Proposal) -> Proposal:
        """Return a draft in the target's ids, after the root."""
        ...


class SharedTokens:
    """The drafter draws shared tokens only. q keeps its rows, over the target's ids.

    Source: Timor et al. 2025, arXiv 2502.05202, algorithm 4 (token-level intersection).
    """

    def __init__(self, other: OtherTokenizer, *, vocab_size: int) -> None:
        self._other = other
        self._vocab_size = vocab_size

    def token(self, own: int) -> int | None:
        return self._other.target_of([own])[0]

    def proposal(self, context: Context, budget: Budget, draft: Proposal) -> Proposal:
        rows_RW = draft.q_rows_RV
        return replace(
            draft,
            tokens_N=torch.tensor([context.tokens[-1], *self._other.target_of(draft.tokens_N[1:].tolist())]),
            q_rows_RV=None if rows_RW is None else self._other.over_target(rows_RW, size=self._vocab_size),
        )


class EncodedText:
    """The drafter draws any token. Its text is encoded with the target's tokenizer, and the result is FIXED.

    q says nothing about these tokens: several drafts spell the same text, and one draft token may be several of the target's. The walk
    accepts a FIXED token if the target draws the same one, which is lossless for any draft.

    Source: Timor et al. 2025, arXiv 2502.05202 (string-level exact match).
    """

    def __init__(self, other: OtherTokenizer) -> None:
        self._other = other

    def token(self, own: int) -> int | None:
        return None

    def proposal(self, context: Context, budget: Budget, draft: Proposal) -> Proposal:
        """Return the branches of a draft, joined where their tokens are the same, as far as the budget goes."""
        nodes: list[tuple[int, int]] = []
        places: dict[tuple[int, int], int] = {}
        for branch in _branches(draft):
            parent = 0
            for token in self._other.target_text.after(context.tokens, branch)[: budget.depth]:
                if (token, parent) not in places:
                    if len(nodes) == budget.nodes:
                        break
                    nodes.append((token, parent))
                    places[token, parent] = len(nodes)
                parent = places[token, parent]
        return fixed_tree(context.tokens[-1], nodes)


def _branches(draft: Proposal) -> Iterator[list[int]]:
    """Yield the draft tokens from the root to each leaf, in draft order."""
    tokens, parents = draft.tokens_N.tolist(), draft.parents_N.tolist()
    inner = set(parents)
    for leaf in range(1, len(tokens)):
        if leaf in inner:
            continue
        branch, node = [], leaf
        while node:
            branch.append(tokens[node])
            node = parents[node]
        yield branch[::-1]
