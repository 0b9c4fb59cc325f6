"""What one sequence drafts in one round, token by token: a chain, or EAGLE-2's dynamic tree.

Both are told the drafter's law after each node of the frontier, and say which nodes are to be read next.

R = the drafter's vocabulary, F = nodes of the frontier, W = children a node, D = hidden, N = scored nodes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.core.probability import draw, over_target_vocabulary, sampling_probs
from drafttrain.core.records import Budget, DraftStep, NodeKind, Proposal, Sampling, chain


@dataclass(frozen=True)
class DraftNode:
    """A draft token whose children are to be drafted: it must be read by the layer."""

    token: int
    depth: int
    parent: int
    """Number of its parent among the nodes that this draft had read, in order; -1: the committed text."""
    state_D: Tensor
    """The layer's state that the token was drafted from."""


class Draft(Protocol):
    """One sequence's draft of a round."""

    frontier: list[DraftNode]
    """Nodes to be read next; empty: the draft is complete."""

    def grow(self, logits_FR: Tensor, states_FD: Tensor) -> None:
        """Draft after the nodes of the frontier; the first time after the committed text, one row."""
        ...

    def proposal(self) -> Proposal:
        """Return what was drafted."""
        ...


class DraftChain:
    """One token after the other: drawn from the drafter's law, or its likeliest."""

    def __init__(
        self,
        root: int,
        budget: Budget,
        *,
        sequence: int,
        vocabulary_R: Tensor,
        vocab_size: int,
        sampling: Sampling,
        greedy: bool,
        generator: torch.Generator,
        more: Callable[[DraftStep], bool],
    ) -> None:
        self.frontier: list[DraftNode] = []
        self._tokens = [root]
        self._laws: list[Tensor] = []
        self._limit = min(budget.nodes, budget.depth)
        self._sequence = sequence
        self._vocabulary_R = vocabulary_R
        self._vocab_size = vocab_size
        self._sampling = sampling
        self._fixed = greedy or sampling.temperature == 0
        self._generator = generator
        self._more = more

    def grow(self, logits_FR: Tensor, states_FD: Tensor) -> None:
        """Draft one more token, unless the length policy says no."""
        self.frontier = []
        depth = len(self._tokens)
        logits_R = logits_FR[0, : len(self._vocabulary_R)]
        if not self._more(DraftStep(self._sequence, depth, logits_R, states_FD[0])):
            return
        if self._fixed:
            place = int(logits_R.argmax())
        else:
            self._laws.append(sampling_probs(logits_R, self._sampling))
            place = draw(self._laws[-1], self._generator)
        token = int(self._vocabulary_R[place])
        self._tokens.append(token)
        if depth < self._limit:
            self.frontier = [DraftNode(token, depth, depth - 2, states_FD[0])]

    def proposal(self) -> Proposal:
        """Return the chain; drawn tokens carry their laws over the target's vocabulary."""
        if not self._laws:
            return chain(self._tokens, kind=NodeKind.FIXED)
        q_rows_RV = over_target_vocabulary(torch.stack(self._laws), self._vocabulary_R, size=self._vocab_size)
        return chain(self._tokens, kind=NodeKind.SAMPLED, q_rows_RV=q_rows_RV)


class DynamicTree:
    """The likeliest draft tokens by the product of the drafter's probabilities along their path.

    Level by level the `width` likeliest nodes are expanded by their `width` likeliest children; in the end the likeliest of all
    nodes that were scored are kept. No node is likelier than its parent, so what is kept is a tree. The nodes are FIXED: which
    they are depends on the committed text alone.

    Source: Li et al. 2024, EAGLE-2, arXiv 2406.16858, 4.
    """

    def __init__(
        self,
        root: int,
        budget: Budget,
        *,
        sequence: int,
        vocabulary_R: Tensor,
        more: Callable[[DraftStep], bool],
    ) -> None:
        self.frontier: list[DraftNode] = []
        self._root = root
        self._budget = budget
        self._sequence = sequence
        self._vocabulary_R = vocabulary_R
        self._more = more
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._scores_N = torch.zeros(0)
        self._expanded: list[int] = [-1]
        """Scored nodes of the frontier, likeliest first; -1 is the root."""
        self._read_before = 0
        """Nodes of earlier frontiers, in the order in which they were read."""

    def grow(self, logits_FR: Tensor, states_FD: Tensor) -> None:
        """Score the children of the frontier and choose the next one; the length policy is asked of its likeliest node."""
        level = self._depths[self._expanded[0]] + 1 if self._tokens else 1
        logits_FR = logits_FR[:, : len(self._vocabulary_R)]
        if not self._more(DraftStep(self._sequence, level, logits_FR[0], states_FD[0])):
            self.frontier = []
            return
        width = min(self._budget.width, logits_FR.shape[1])
        log_q = (
            logits_FR.to(torch.promote_types(logits_FR.dtype, torch.float32)).log_softmax(dim=-1).topk(width, dim=-1)
        )
        scores_F = self._scores_N.to(log_q.values.device)[self._expanded] if self._tokens else log_q.values.new_zeros(1)
        scores_FW = scores_F[:, None] + log_q.values
        first = len(self._tokens)
        self._tokens += self._vocabulary_R[log_q.indices.flatten()].tolist()
        self._parents += [parent for parent in self._expanded for _ in range(width)]
        self._depths += [level] * scores_FW.numel()
        self._scores_N = torch.cat([self._scores_N.to(scores_FW), scores_FW.flatten()])
        if level == self._budget.depth:
            self.frontier = []
            return
        best = scores_FW.flatten().sort(descending=True, stable=True).indices[: self._budget.width].tolist()
        read = [self._read_before + place for place in range(len(self._expanded))] if first else [-1]
        self.frontier = [
            DraftNode(self._tokens[first + i], level, read[i // width], states_FD[i // width]) for i in best
        ]
        self._read_before += len(read) if first else 0
        self._expanded = [first + i for i in best]

    def proposal(self) -> Proposal:
        """Return the likeliest nodes as a tree under the root."""
        kept = likeliest(self._scores_N, count=self._budget.nodes)
        place = {-1: 0} | {node: number for number, node in enumerate(kept, start=1)}
        fixed = NodeKind.FIXED.value
        return Proposal(
            tokens_N=torch.tensor([self._root, *(self._tokens[node] for node in kept)]),
            parents_N=torch.tensor([-1, *(place[self._parents[node]] for node in kept)]),
            depths_N=torch.tensor([0, *(self._depths[node] for node in kept)]),
            kinds_N=torch.tensor([NodeKind.ROOT.value] + [fixed] * len(kept)),
        )


def likeliest(scores_N: Tensor, *, count: int) -> Sequence[int]:
    """Return the nodes of the highest scores in their order; of equal ones the earlier, so that no node loses its parent."""
    kept: list[int] = scores_N.sort(descending=True, stable=True).indices[:count].sort().values.tolist()
    return kept
