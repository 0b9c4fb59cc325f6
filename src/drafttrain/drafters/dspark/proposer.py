"""The proposer of DSpark: one pass over the block, then a walk over its slots from left to right.

S = sequences, M = chains that grow (or nodes of all trees' frontiers), K = draft tokens of a block, D = hidden, r = rank,
W = width of the drafter's head
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
from drafttrain.drafters.dspark.markov import ConfidenceHead, MarkovHead
from drafttrain.drafters.dynamic_tree import DynamicTree
from drafttrain.drafters.few_rows import product_with


class WalkedModel(BlockModel, Protocol):
    """What the walk needs beside the block."""

    markov_head: MarkovHead
    confidence_head: ConfidenceHead | None
    temperatures: Sequence[float]


@dataclass(frozen=True)
class _Slot:
    """What is computed of one slot of some blocks, whose tokens before are known."""

    logits_MW: Tensor
    states_MD: Tensor
    """[h ; f], as in training."""
    confidence_M: Tensor | None
    """Logits of the predicted acceptance, calibrated."""
    state_Mr: Tensor
    """The recurrent state after the slot."""


class DSparkProposer(BlockProposer):
    """Chains are drawn token by token: each from a distribution that depends on the token before, with exactly known rows of q.

    A length policy is asked before a token is drawn, with its predicted acceptance. That is made from the tokens before it, so a
    chain may end there and the output stays lossless.
    """

    def __init__(self, model: WalkedModel, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._markov = model.markov_head
        self._confidence = model.confidence_head
        self._temperatures = model.temperatures
        self._bias = product_with([self._markov.markov_w2])

    def extend(self, chains: Chains, states_SKD: Tensor) -> None:
        """Draft the chains from left to right."""
        alive = chains.growing
        hidden_MKD = self.of_growing(chains, states_SKD)
        base_MKW = self._head(hidden_MKD)
        state_Mr = self._markov.start(hidden_MKD[:, 0])
        for place in range(hidden_MKD.shape[1]):
            tokens_M = torch.tensor(chains.newest).to(self._device)
            slot = self._slot(place, hidden_MKD[:, place], base_MKW[:, place], tokens_M, state_Mr)
            scores_M1 = None if slot.confidence_M is None else slot.confidence_M[:, None]
            chains.extend(slot.logits_MW[:, None], slot.states_MD[:, None], scores_M1)
            state_Mr = slot.state_Mr
            if not (growing := chains.growing):
                return
            if len(growing) < len(alive):
                rows_M = torch.tensor([alive.index(sequence) for sequence in growing]).to(self._device)
                hidden_MKD, base_MKW, state_Mr = (
                    values.index_select(0, rows_M) for values in (hidden_MKD, base_MKW, state_Mr)
                )
                alive = growing

    def trees(
        self, budgets: Sequence[Budget], states_SKD: Tensor, more: Callable[[DraftStep], bool | More]
    ) -> list[Proposal]:
        """Return a tree for each sequence, as EAGLE-2 grows it: the children of a node depend on its token."""
        base_SKW = self._head(states_SKD)
        trees = [DynamicTree(one.tokens[-1], budget) for one, budget in zip(self._contexts, budgets, strict=True)]
        states = [{0: row_r} for row_r in self._markov.start(states_SKD[:, 0]).unbind()]
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
            for (number, node), state_r in zip(nodes, slot.state_Mr.unbind(), strict=True):
                tree = trees[number]
                states[number].update({child: state_r for child in tree.frontier if tree.parents[child] == node})
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

    def _slot(self, place: int, hidden_MD: Tensor, base_MW: Tensor, tokens_M: Tensor, state_Mr: Tensor) -> _Slot:
        embedded_Mr = self._markov.embed(tokens_M).to(hidden_MD.dtype)
        factors_Mr, state_Mr = self._markov.step(hidden_MD, embedded_Mr, state_Mr)
        confidence_M = None
        if self._confidence is not None:
            confidence_M = self._confidence(hidden_MD, embedded_Mr) / self._temperatures[place]
        return _Slot(
            logits_MW=base_MW + self._bias(factors_Mr),
            states_MD=torch.cat([hidden_MD, factors_Mr], dim=-1),
            confidence_M=confidence_M,
            state_Mr=state_Mr,
        )
