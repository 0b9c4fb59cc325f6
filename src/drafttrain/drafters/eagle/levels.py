"""Drafting level by level: one call of the drafter gives every chain a token, and every tree a level.

N = rows of a call, R = the drafter's vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from torch import Tensor

from drafttrain.core.proposals import Proposal
from drafttrain.drafters.chain_draft import Chains
from drafttrain.drafters.tree_draft import DraftNode, Trees

ReadNext = Callable[[Sequence[int], Sequence[Sequence[DraftNode]]], tuple[Tensor, Tensor]]
"""Returns (logits_NR, states_ND) after each frontier node of each sequence.

Its arguments: the sequences that draft; and by sequence the draft tokens to read, empty at the start of a round: the committed text
is read.
"""


def drafted_chains(chains: Chains, read_next: ReadNext) -> list[Proposal]:
    """Return one chain per sequence; each call gives all of them one more token."""
    frontiers: list[list[DraftNode]] = []
    for depth in count(1):
        growing = chains.growing
        if not growing:
            break
        logits_NR, states_ND = read_next(growing, frontiers)
        chains.extend(logits_NR[:, None], states_ND[:, None])
        state_of = dict(zip(growing, states_ND.unbind(), strict=True))
        frontiers = [
            [DraftNode(token, depth, depth - 2, state_of[number]) for token in tokens]
            for number, tokens in enumerate(chains.inputs)
        ]
    return chains.proposals()


def drafted_trees(trees: Trees, read_next: ReadNext) -> list[Proposal]:
    """Return one tree per sequence; each call reads the nodes of all frontiers."""
    frontiers: list[list[DraftNode]] = []
    while growing := trees.growing:
        logits_NR, states_ND = read_next(growing, frontiers)
        trees.extend(logits_NR, states_ND)
        frontiers = trees.frontiers
    return trees.proposals()
