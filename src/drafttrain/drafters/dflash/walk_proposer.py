"""The proposer of block drafters that walk: one pass over the block, then its slots from left to right.

S = sequences, M = chains that grow (or nodes of all trees' frontiers), K = draft tokens of a block, D = hidden,
W = width of the drafter's head, e = width of an embedded token, f = width of a factor, s = width of the walk's state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, DraftStep, More, Proposal
from drafttrain.drafters.chain_draft import Chains
from drafttrain.drafters.dflash.proposer import BlockModel, BlockProposer
from drafttrain.drafters.dflash.walk import Correction, Walk
from drafttrain.drafters.dynamic_tree import DynamicTree


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

    def trees(
        self, budgets: Sequence[Budget], states_SKD: Tensor, more: Callable[[DraftStep], bool | More]
    ) -> list[Proposal]:
        """Return a tree for each sequence, as EAGLE-2 grows it: the children of a node depend on its token."""
        base_SKW = self._head(self._head_states(states_SKD))
        trees = [DynamicTree(one.tokens[-1], budget) for one, budget in zip(self._contexts, budgets, strict=True)]
        states = [{0: row_s} for row_s in self._walk.start(states_SKD[:, 0]).unbind()]
        for place in range(states_SKD.shape[1]):
            nodes = [(number, node) for number, tree in enumerate(trees) for node in tree.frontier]
            if not nodes:
                break
            rows_M, tokens_M = torch.tensor([(number, trees[number].tokens[node]) for number, node in nodes]).T.to(
                self._device
            )
            slot = self._slot(
                place,
                states_SKD[:, place].index_select(0, rows_M),
                base_SKW[:, place].index_select(0, rows_M),
                tokens_M,
                torch.stack([states[number][node] for number, node in nodes]),
            )
            self._grow(trees, nodes, slot, place + 1, more)
            for (number, node), state_s in zip(nodes, slot.state_Ms.unbind(), strict=True):
                tree = trees[number]
                states[number].update({child: state_s for child in tree.frontier if tree.parents[child] == node})
        return [tree.proposal() for tree in trees]

    def _grow(
        self,
        trees: Sequence[DynamicTree],
        nodes: Sequence[tuple[int, int]],
        slot: _Slot,
        depth: int,
        more: Callable[[DraftStep], bool | More],
    ) -> None:
        """Add a level to every tree. The device is read once."""
        logits_MR = self._vocabulary.logits(slot.logits_MW)
        width = min(max(tree.budget.width for tree in trees), logits_MR.shape[-1])
        wide = torch.promote_types(logits_MR.dtype, torch.float32)
        best = logits_MR.log_softmax(dim=-1, dtype=wide).topk(width, dim=-1)
        # float64 holds scores and ids exactly.
        scores, places = torch.stack([best.values.double(), best.indices.double()]).tolist()
        for number, tree in enumerate(trees):
            rows = [row for row, (sequence, _) in enumerate(nodes) if sequence == number]
            steps = [
                DraftStep(
                    number,
                    depth,
                    logits_MR[row],
                    slot.states_MD[row],
                    token=tree.tokens[nodes[row][1]],
                    confidence=None if slot.confidence_M is None else slot.confidence_M[row],
                )
                for row in rows
            ]
            if rows:
                tree.add_level(
                    [self._vocabulary.ids([int(one) for one in places[row]]) for row in rows],
                    [scores[row] for row in rows],
                    [bool(more(step)) for step in steps],
                )

    def _slot(self, place: int, hidden_MD: Tensor, base_MW: Tensor, tokens_M: Tensor, state_Ms: Tensor) -> _Slot:
        embedded_Me = self._walk.embed(tokens_M, dtype=hidden_MD.dtype)
        factors_Mf, state_Ms = self._walk.step(place, hidden_MD, embedded_Me, state_Ms)
        return _Slot(
            logits_MW=self._corrected(base_MW, factors_Mf),
            states_MD=torch.cat([self._head_states(hidden_MD), factors_Mf], dim=-1),
            confidence_M=self.confidence(place, hidden_MD, embedded_Me),
            state_Ms=state_Ms,
        )
