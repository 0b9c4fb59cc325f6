"""The proposer of block drafters that walk: one pass over the block, then its slots from left to right.

S = sequences, M = chains that grow (or nodes of all trees' frontiers), K = draft tokens of a block, D = hidden,
W = width of the drafter's head, e = width of an embedded token, f = width of a factor, s = width of the walk's state
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.drafters.chain_draft import Chains
from drafttrain.drafters.dflash.proposer import BlockModel, BlockProposer
from drafttrain.drafters.dflash.walk import Correction, Walk
from drafttrain.drafters.tree_draft import DraftNode, Trees


class WalkedModel(BlockModel, Protocol):
    """What the walk needs beside the block."""

    @property
    def walk(self) -> Walk:
        """The walk over the slots."""
        ...

    def head_states(self, hidden: Tensor) -> Tensor:
        """Return the part of the states that the head reads."""
        ...

    def correction(self) -> Correction:
        """Return how the factors change the logits, with its weights prepared once."""
        ...


@dataclass(frozen=True)
class _Slot:
    """What is computed of one slot of some blocks, whose tokens before are known."""

    logits_MW: Tensor
    states_MD: Tensor
    """[h ; f], as in training."""
    confidence_M: Tensor | None
    state_Ms: Tensor
    """The walk's state after the slot."""


class WalkProposer(BlockProposer):
    """Chains are drawn token by token: each from a distribution that depends on the tokens before, with exactly known rows of q.

    A length policy is asked before a token is drawn, with its predicted acceptance if the kind has one. That is made from the
    tokens before it, so a chain may end there and the output stays lossless.
    """

    def __init__(self, model: WalkedModel, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._walk = model.walk
        self._head_states = model.head_states
        self._corrected = model.correction()

    def confidence(self, place: int, hidden_MD: Tensor, embedded_Me: Tensor) -> Tensor | None:
        """Return confidence_M, the logits of the predicted acceptance of a slot's tokens; None: the kind predicts none."""
        return None

    def extend(self, chains: Chains, states_SKD: Tensor) -> None:
        """Draft the chains from left to right."""
        alive = chains.growing
        hidden_MKD = self.of_growing(chains, states_SKD)
        base_MKW = self._head(self._head_states(hidden_MKD))
        state_Ms = self._walk.start(hidden_MKD[:, 0])
        for place in range(hidden_MKD.shape[1]):
            tokens_M = torch.tensor(chains.newest).to(self._device)
            slot = self._slot(place, hidden_MKD[:, place], base_MKW[:, place], tokens_M, state_Ms)
            scores_M1 = None if slot.confidence_M is None else slot.confidence_M[:, None]
            chains.extend(slot.logits_MW[:, None], slot.states_MD[:, None], scores_M1)
            state_Ms = slot.state_Ms
            if not (growing := chains.growing):
                return
            if len(growing) < len(alive):
                rows_M = torch.tensor([alive.index(sequence) for sequence in growing]).to(self._device)
                hidden_MKD, base_MKW, state_Ms = (
                    values.index_select(0, rows_M) for values in (hidden_MKD, base_MKW, state_Ms)
                )
                alive = growing

    def extend_trees(self, trees: Trees, states_SKD: Tensor) -> None:
        """Draft the trees: the children of a node depend on its token. A frontier may have nodes of several depths."""
        base_SKW = self._head(self._head_states(states_SKD))
        start_Ss = self._walk.start(states_SKD[:, 0])
        roots = [
            DraftNode(one.tokens[-1], 0, -1, state_s)
            for one, state_s in zip(self._contexts, start_Ss.unbind(), strict=True)
        ]
        nodes = [(number, roots[number]) for number in trees.growing]
        while nodes:
            slots: list[_Slot] = []
            # By depth: the walk takes a step of one slot.
            order = sorted(range(len(nodes)), key=lambda row: nodes[row][1].depth)
            for depth, rows in groupby(order, key=lambda row: nodes[row][1].depth):
                of_depth = [nodes[row] for row in rows]
                sequences_M, tokens_M = torch.tensor([(number, node.token) for number, node in of_depth]).T.to(
                    self._device
                )
                slots.append(
                    self._slot(
                        depth,
                        states_SKD[:, depth].index_select(0, sequences_M),
                        base_SKW[:, depth].index_select(0, sequences_M),
                        tokens_M,
                        torch.stack([node.state_D for _, node in of_depth if node.state_D is not None]),
                    )
                )
            slot = _joined(slots, order)
            trees.extend(slot.logits_MW, slot.states_MD, slot.confidence_M, carried_MD=slot.state_Ms)
            nodes = [(number, node) for number, of in enumerate(trees.frontiers) for node in of]

    def _slot(self, place: int, hidden_MD: Tensor, base_MW: Tensor, tokens_M: Tensor, state_Ms: Tensor) -> _Slot:
        embedded_Me = self._walk.embed(tokens_M, dtype=hidden_MD.dtype)
        factors_Mf, state_Ms = self._walk.step(place, hidden_MD, embedded_Me, state_Ms)
        return _Slot(
            logits_MW=self._corrected(base_MW, factors_Mf),
            states_MD=torch.cat([self._head_states(hidden_MD), factors_Mf], dim=-1),
            confidence_M=self.confidence(place, hidden_MD, embedded_Me),
            state_Ms=state_Ms,
        )


def _joined(slots: Sequence[_Slot], order: Sequence[int]) -> _Slot:
    """Return the slots of several depths as one, whose row `order[i]` is the i-th of them."""
    if len(slots) == 1:
        return slots[0]
    rows_M = torch.tensor(order).argsort().to(slots[0].logits_MW.device)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).index_select(0, rows_M)

    confidence = [one.confidence_M for one in slots if one.confidence_M is not None]
    return _Slot(
        joined([one.logits_MW for one in slots]),
        joined([one.states_MD for one in slots]),
        joined(confidence) if confidence else None,
        joined([one.state_Ms for one in slots]),
    )
