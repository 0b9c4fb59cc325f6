"""The base of block drafters that walk over their slots (`walk.Walk`): training, head, counted operations.

A = blocks, K = draft tokens of a block, D = hidden, N = rows, W = width of the drafter's head, e = width of an embedded token,
f = width of a factor
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from drafttrain.core.batches import DraftBatch, DraftOutput, Head
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.linear_head import LinearHead
from drafttrain.core.weights import Weights, weights_of
from drafttrain.drafters.dflash.blocks import Blocks
from drafttrain.drafters.dflash.drafter import BlockDrafter
from drafttrain.drafters.dflash.proposer import BlockProposer
from drafttrain.drafters.dflash.walk import AddingWalk, Correction, Walk
from drafttrain.drafters.dflash.walk_proposer import WalkProposer
from drafttrain.drafters.few_rows import product_with


class WalkedDrafter(BlockDrafter):
    """States of a depth are [h ; f], so that one head makes their logits. In training the tokens before are the text's."""

    proposer_class: ClassVar[type[BlockProposer]] = WalkProposer

    @property
    @abstractmethod
    def walk(self) -> Walk:
        """The walk over the slots."""

    @property
    @abstractmethod
    def step_modules(self) -> Sequence[nn.Module]:
        """The modules whose weights every step of the walk reads."""

    @property
    def num_steps(self) -> int:
        """Steps of the walk in a round."""
        return self.num_depths

    def head_states(self, hidden_AKE: Tensor) -> Tensor:
        """Return states_AKD, the part of `predicting` that the block's own head reads: all of it, unless a kind packs more."""
        return hidden_AKE

    def drafted(self, hidden_AKD: Tensor, blocks: Blocks, batch: DraftBatch) -> DraftOutput:
        """Return the states [h ; f] of every depth, and what else the kind trains."""
        places = range(hidden_AKD.shape[1])
        before_AK = torch.stack([blocks.at(batch.tokens_BT, places=place) for place in places], dim=1)
        embedded_AKe = self.walk.embed(before_AK, dtype=hidden_AKD.dtype)
        factors_AKf = self.walk.factors(hidden_AKD, embedded_AKe).to(hidden_AKD.dtype)
        made = super().drafted(torch.cat([self.head_states(hidden_AKD), factors_AKf], dim=-1), blocks, batch)
        return self.completed(made, hidden_AKD, embedded_AKe, batch)

    def completed(self, made: DraftOutput, hidden_AKD: Tensor, embedded_AKe: Tensor, batch: DraftBatch) -> DraftOutput:
        """Return the output of a forward with what else a kind predicts or trains."""
        return made

    @property
    def base_head(self) -> Head:
        """The head without the walk, for states h."""
        return super().head

    @abstractmethod
    def correction(self) -> Correction:
        """Return how the factors change the logits in decoding, with its weights prepared for few rows."""

    def decoding_weights(self) -> tuple[Weights, Weights, Weights, int]:
        """Return the weights of (the context, a block, the head and the walk), and the bytes of one embedding row.

        A step of the walk reads its weights for one row of each block.
        """
        of_context, of_block, of_head, row = super().decoding_weights()
        step = weights_of(*self.step_modules)
        return of_context, of_block, of_head + replace(step, num_bytes=self.num_steps * step.num_bytes), row


class AddingDrafter(WalkedDrafter):
    """The factors of a slot, times a matrix, are added to its logits."""

    @property
    @abstractmethod
    def walk(self) -> AddingWalk:
        """The walk over the slots."""

    def correction(self) -> Correction:
        """Return the sum."""
        added = product_with([self.walk.added])
        return lambda base_AW, factor_Af: base_AW + added(factor_Af)

    @property
    def head(self) -> Head:
        """The head as losses use it, for states [h ; f]."""
        base, added = self.base_head, self.walk.added
        if isinstance(base, LinearHead):
            return LinearHead(base.linear, before=base.before, after=base.after, added=added)

        def logits(states_ND: Tensor, depth: int) -> Tensor:
            own_ND, factors_Nf = states_ND.tensor_split([states_ND.shape[-1] - added.in_features], dim=-1)
            logits_NW: Tensor = base(own_ND, depth) + added(factors_Nf)
            return logits_NW

        return logits

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the block, and of the factors."""
        yield from super().products(shape)
        blocks = shape.blocks(self.own["anchors"])
        for depth in range(1, self.num_depths + 1):
            yield matrix(parameters_of(self.walk.added), blocks.rows(depth), gradients=2)
