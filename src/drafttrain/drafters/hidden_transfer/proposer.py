"""The proposer of Hidden Transfer: pseudo states after the last token that the target has read, through its remaining blocks.

B = sequences, G = sequences that draft, K = draft tokens, D = hidden, R = the target's vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.roles import ForwardListener
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.core.vocabulary import DraftVocabulary
from drafttrain.core.weights import weights_of
from drafttrain.drafters.chain_draft import ChainDraft
from drafttrain.drafters.hidden_transfer.rollout import parts
from drafttrain.drafters.tree_draft import TreeDraft
from drafttrain.target_model.cached_lm import CachedLM


class Maps(Protocol):
    """What drafting needs of the maps."""

    maps: nn.ModuleList
    layers: list[int]

    @property
    def num_blocks(self) -> int:
        """Of the target."""
        ...

    def pseudo(self, step: int, states: Tensor) -> Tensor:
        """Return the pseudo state of a step, from 0."""
        ...


class HiddenTransferProposer:
    """One pass a round: the pseudo states of all steps, beside the target's cache. They are never cached.

    Args:
        vocab_size: Width of the rows of q.
        num_tokens: Ids that the tokenizer can produce; the others get no probability.
        draft: `greedy`: FIXED nodes at every temperature.
    """

    def __init__(
        self,
        model: Maps,
        *,
        vocab_size: int,
        num_tokens: int,
        listener: ForwardListener | None = None,
        draft: str = "sampled",
    ) -> None:
        self.needs = TargetNeeds(hidden=tuple(sorted(set(model.layers))))
        self._model = model
        vocabulary = DraftVocabulary(None, num_tokens=num_tokens)
        self._draft = ChainDraft(vocabulary, vocab_size, draft)
        self._tree_draft = TreeDraft(vocabulary, vocab_size, draft)
        self._listener = listener
        self._target: CachedLM | None = None
        self._contexts: list[Context] = []
        self._states: list[dict[int, Tensor]] = []
        """By sequence and block, the target's state of the last token that it has read; empty: there is none."""

    def share(self, target: CachedLM) -> None:
        """Store the verifying target."""
        self._target = target

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Store the states of the last token before each root."""
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
        """Return one chain per sequence, or one tree if the budgets are wider than 1."""
        budgets = [
            budget.within(len(self._model.layers) if states else 0)
            for budget, states in zip(budgets, self._states, strict=True)
        ]
        round_of = (self._contexts, budgets, sampling, generators, more)
        chains = self._draft.begin(*round_of)
        if not (growing := chains.growing):
            return chains.proposals()
        num_steps = max(min(one.nodes, one.depth) for one in budgets)
        logits_GKR, states_GKD = self._pass(growing, num_steps=num_steps)
        if any(budget.width > 1 for budget in budgets):
            # Of a sequence that does not draft nothing is read.
            row_of = [growing.index(number) if number in growing else 0 for number in range(len(budgets))]
            trees = self._tree_draft.begin(*round_of)
            trees.extend_to_the_end(logits_GKR[row_of], states_GKD[row_of])
            return trees.proposals()
        chains.extend(logits_GKR, states_GKD)
        return chains.proposals()

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Store the states of the last accepted node: the target's token after it is the next root."""
        self._states = [_last(output) for output in seen]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._states = [self._states[i] for i in keep]

    def _pass(self, growing: Sequence[int], *, num_steps: int) -> tuple[Tensor, Tensor]:
        """Return (logits_GKR, states_GKD) of all steps: each part of the blocks runs the pseudo states that have entered so far."""
        assert self._target is not None, "the engine calls `share` before `begin`"
        lm, layers = self._target, self._model.layers[:num_steps]
        rows: list[list[Tensor]] = [[] for _ in self._states]
        for running in parts(layers, num_blocks=self._model.num_blocks):
            self._enter(rows, growing, running.start, layers)
            last = running.stop == self._model.num_blocks
            needs = TargetNeeds(hidden=(running.stop,), logits=last, final=last)
            entering = [torch.stack(of) if of else None for of in rows]
            seen = lm.read_last_blocks(entering, running=running, needs=needs)
            rows = [list(one.hidden_BTD[running.stop][0]) if one.hidden_BTD else [] for one in seen]
        drafted = [seen[number] for number in growing]
        logits = [one.logits_BTV[0] for one in drafted if one.logits_BTV is not None]
        return torch.stack(logits), torch.stack([one.final_BTD[0] for one in drafted if one.final_BTD is not None])

    def _enter(self, rows: list[list[Tensor]], growing: Sequence[int], block: int, layers: Sequence[int]) -> None:
        """Append the pseudo states that enter a block."""
        span = Span(self._states[growing[0]][block].device)
        steps = [step for step, layer in enumerate(layers) if layer == block]
        states_GD = torch.stack([self._states[number][block] for number in growing])
        for step in steps:
            for number, pseudo_D in zip(growing, self._model.pseudo(step, states_GD), strict=True):
                rows[number].append(pseudo_D)
        if self._listener is not None:
            count = len(growing)
            shape = ForwardShape.of([1] * count, [0] * count, num_layers=1, head_rows=0)
            work = weights_of(*(self._model.maps[step] for step in steps)).read(count)
            self._listener(ForwardEvent("drafter", shape, work, span.end()))


def _last(output: TargetOutput) -> dict[int, Tensor]:
    """Return the target's states of the last token that was read, by block; none where none was."""
    return {block: states[0, -1] for block, states in output.hidden_BTD.items() if states.shape[1]}
