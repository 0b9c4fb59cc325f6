"""EAGLE-2's dynamic tree of one sequence, and the draft tokens that the layer reads next, of a tree or a chain.

R = the drafter's vocabulary, F = nodes of the frontier, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, DraftStep, More, Proposal
from drafttrain.drafters.dynamic_tree import DynamicTree


@dataclass(frozen=True)
class DraftNode:
    """A draft token whose children will be drafted: the layer must read it."""

    token: int
    depth: int
    parent: int
    """Number of its parent in the order in which the draft's nodes were read; -1: the committed text."""
    state_D: Tensor
    """The layer's state that the token was drafted from."""


class DraftTree:
    """EAGLE-2's dynamic tree: level by level, the likeliest nodes are read. Its nodes are FIXED at every temperature.

    Source: Li et al. 2024, EAGLE-2, arXiv 2406.16858, 4.
    """

    def __init__(
        self,
        root: int,
        budget: Budget,
        *,
        sequence: int,
        vocabulary_R: Tensor,
        more: Callable[[DraftStep], bool | More],
    ) -> None:
        self.frontier: list[DraftNode] = []
        """Nodes to read next; empty: the tree is complete."""
        self._tree = DynamicTree(root, budget)
        self._sequence = sequence
        self._vocabulary_R = vocabulary_R
        self._more = more
        self._read = {0: -1}
        """By node of the tree, its number in the order of reading; -1 for the root, which is committed text."""

    def grow(self, logits_FR: Tensor, states_FD: Tensor) -> None:
        """Add the children of frontier nodes that the length policy allows, and choose the next frontier."""
        tree, row_of = self._tree, {node: row for row, node in enumerate(self._tree.frontier)}
        logits_FR = logits_FR[:, : len(self._vocabulary_R)]
        rows = logits_FR.unbind()
        states = states_FD.unbind()
        expand = [
            bool(self._more(DraftStep(self._sequence, tree.depth + 1, rows[row], states[row], self._token(node))))
            for node, row in row_of.items()
        ]
        wide = torch.promote_types(logits_FR.dtype, torch.float32)
        tree.grow(logits_FR.log_softmax(dim=-1, dtype=wide), expand)
        self.frontier = [
            DraftNode(self._token(node), tree.depth, self._read[tree.parents[node]], states[row_of[tree.parents[node]]])
            for node in tree.frontier
        ]
        self._read |= {node: len(self._read) - 1 + place for place, node in enumerate(tree.frontier)}

    def proposal(self) -> Proposal:
        """Return the likeliest nodes as a tree under the root."""
        kept = self._tree.proposal()
        kept.tokens_N[1:] = self._vocabulary_R[kept.tokens_N[1:]]
        return kept

    def _token(self, node: int) -> int:
        """Return the target's id of a node's token."""
        token = self._tree.tokens[node]
        return token if node == 0 else int(self._vocabulary_R[token])
