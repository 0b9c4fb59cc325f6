"""Drafting chains with the target's own first blocks: they run once per token, and the target continues from their states.

N = rows of one call, D = hidden, R = tokens that can be drafted, K = draft tokens
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Budget, Context, DraftStep, LayerState, More, Proposal, Verdict
from drafttrain.core.roles import FirstBlocks
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters.chain_draft import ChainDraft


class FirstBlocksProposer(ABC):
    """Base class: `read` turns states that leave the first blocks into logits.

    The first blocks read every draft token, even the last one, because the target continues from the states of all nodes.
    What reads their states reads a token only if another one is drafted after it.

    Args:
        exit_layer: Number of first blocks.
    """

    kind: ClassVar[str]

    def __init__(self, draft: ChainDraft, *, exit_layer: int) -> None:
        self.needs = TargetNeeds()
        self._draft = draft
        self._exit_layer = exit_layer
        self._shared: FirstBlocks | None = None
        self._contexts: list[Context] = []
        self._states: list[list[Tensor]] = []
        """By sequence and node of its draft, the state that enters the exit layer."""
        self._unread: list[list[Tensor]] = []
        """By sequence, the states of committed tokens that `read` has not got yet, if it reads all of them."""

    @property
    def _blocks(self) -> FirstBlocks:
        assert self._shared is not None, "the engine calls `share` before `begin`"
        return self._shared

    def share(self, target: FirstBlocks) -> None:
        """Store the target's first blocks, split at the exit layer."""
        target.split_at(self._exit_layer)
        self._shared = target

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new sequences."""
        self._contexts = list(contexts)
        self._unread = [[] for _ in contexts]

    @abstractmethod
    def read(self, inputs: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Return (states_ND, logits_NR) after the last state of each sequence that has any.

        Args:
            inputs: By sequence, new states that enter the exit layer.
        """

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, with the states of its nodes."""
        if any(budget.width > 1 for budget in budgets):
            raise CheckpointError(f"{self.kind} drafts chains only: use a length policy of width 1")
        chains = self._draft.begin(self._contexts, budgets, sampling, generators, more)
        self._states = self._first_blocks([context.tokens[-1:] for context in self._contexts])
        inputs = chains.where_growing(
            [[*unread, *states] for unread, states in zip(self._unread, self._states, strict=True)]
        )
        while chains.growing:
            states_ND, logits_NR = self.read(inputs)
            chains.extend(logits_NR[:, None], states_ND[:, None])
            if any(chains.drafted):
                for states, new in zip(self._states, self._first_blocks(chains.drafted), strict=True):
                    states += new
            inputs = chains.where_growing([states[-1:] for states in self._states])
        return [
            replace(proposal, resume=LayerState(self._exit_layer, torch.stack(states)))
            for proposal, states in zip(chains.proposals(), self._states, strict=True)
        ]

    def _first_blocks(self, tokens: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Return, by sequence, the states of its new tokens."""
        return [list(one.hidden_ND) for one in self._blocks.run_first_blocks(tokens)]

    @abstractmethod
    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Update what `read` caches. The keys and values of the first blocks are the target's."""

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._unread = [self._unread[i] for i in keep]
