"""The proposer of Hidden Transfer: pseudo states after the last token that the target has read, through its remaining blocks.

B = sequences, G = sequences that draft, K = draft tokens, D = hidden, R = the target's vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from drafttrain.core.console import say_once
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

Drafts = tuple[Tensor, Tensor]
"""(logits_KR, states_KD) of all steps."""


class Maps(Protocol):
    """What drafting needs of the maps."""

    maps: nn.ModuleList
    layers: list[int]
    draft_in: str

    @property
    def num_blocks(self) -> int:
        """Of the target."""
        ...

    def pseudo(self, step: int, states: Tensor) -> Tensor:
        """Return the pseudo state of a step, from 0."""
        ...


class HiddenTransferProposer:
    """Drafts from pseudo states of all steps after the last token that the target has read. They are never cached.

    They are rows of the verifying call, after every node that may be the last accepted one (`RowsBeside`). After a prompt, and with
    `own_pass` in every round, they run in a pass of the last blocks beside the target's cache. So they do where a sliding window or
    the position embeddings have no room for them in the verifying call.

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
        self.needs = TargetNeeds(hidden=tuple(sorted(set(model.layers))), final=True)
        self.layers = model.layers
        self._model = model
        vocabulary = DraftVocabulary(None, num_tokens=num_tokens)
        self._draft = ChainDraft(vocabulary, vocab_size, draft)
        self._tree_draft = TreeDraft(vocabulary, vocab_size, draft)
        self._listener = listener
        self._target: CachedLM | None = None
        self._contexts: list[Context] = []
        self._states: list[dict[int, Tensor]] = []
        """By sequence and block, the target's state of the last token that it has read; empty: there is none."""
        self._rows: Sequence[TargetOutput] = []
        """By sequence, the outputs at the rows of the last verifying call."""
        self._drafts: list[Drafts | None] = []
        """By sequence, what the verifying call made of the pseudo states of the last accepted node; None: nothing."""

    def share(self, target: CachedLM) -> None:
        """Store the verifying target, and add rows to its calls."""
        self._target = target
        if self._model.draft_in == "verifying_call":
            if why := target.why_one_at_a_time(0):
                say_once(f"drafter.draft_in: verifying_call needs masks, so own_pass is used: {why}")
            else:
                target.rows_beside = self

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Store the states of the last token before each root."""
        self._contexts = list(contexts)
        self._states = [_last(output) for output in seen]
        self._drafts = [None] * len(contexts)

    def entering(self, row: int, states_MD: Tensor) -> Tensor:
        """Return the pseudo states of a step, and report the map to the ledger."""
        # The time is that of the target's call.
        self._report([row], len(states_MD), Span(states_MD.device))
        return self._model.pseudo(row, states_MD)

    def receive(self, seen: Sequence[TargetOutput]) -> None:
        """Store the outputs at the pseudo states of every node."""
        self._rows = seen

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
        logits_GKR, states_GKD = self._after(growing, num_steps=num_steps)
        if any(budget.width > 1 for budget in budgets):
            if len(growing) < len(budgets):
                # Of a sequence that does not draft nothing is read.
                row_of = [growing.index(number) if number in growing else 0 for number in range(len(budgets))]
                logits_GKR, states_GKD = logits_GKR[row_of], states_GKD[row_of]
            trees = self._tree_draft.begin(*round_of)
            trees.extend_to_the_end(logits_GKR, states_GKD)
            return trees.proposals()
        chains.extend(logits_GKR, states_GKD)
        return chains.proposals()

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Store the states of the last accepted node, and what was made of them: the target's token after it is the next root."""
        self._states = [_last(output) for output in seen]
        self._drafts = [None] * len(seen)
        count = len(self.layers)
        for number, (rows, verdict) in enumerate(zip(self._rows, verdicts, strict=bool(self._rows))):
            chain = slice(verdict.path[-1] * count, (verdict.path[-1] + 1) * count)
            assert rows.logits_BTV is not None
            assert rows.final_BTD is not None
            # Copies: a view would keep the rows of all nodes through the next call.
            self._drafts[number] = rows.logits_BTV[0, chain].clone(), rows.final_BTD[0, chain].clone()
        self._rows = []

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._states = [self._states[i] for i in keep]
        self._drafts = [self._drafts[i] for i in keep]

    def _after(self, growing: Sequence[int], *, num_steps: int) -> Drafts:
        """Return (logits_GKR, states_GKD) of these sequences: from the last verifying call, or from a pass of their own."""
        made: dict[int, Drafts] = {}
        if missing := [number for number in growing if self._drafts[number] is None]:
            made = dict(zip(missing, zip(*self._pass(missing, num_steps=num_steps), strict=True), strict=True))
        found = [self._drafts[number] or made[number] for number in growing]
        logits, states = ([one[:num_steps] for one in of] for of in zip(*found, strict=True))
        return torch.stack(logits), torch.stack(states)

    def _pass(self, growing: Sequence[int], *, num_steps: int) -> Drafts:
        """Return (logits_GKR, states_GKD): each part of the blocks runs the pseudo states that have entered so far."""
        assert self._target is not None, "the engine calls `share` before `begin`"
        lm, layers = self._target, self.layers[:num_steps]
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
        self._report(steps, len(growing), span)

    def _report(self, steps: Sequence[int], count: int, span: Span) -> None:
        """Report maps to the listener."""
        if self._listener is not None:
            shape = ForwardShape.of([1] * count, [0] * count, num_layers=1, head_rows=0)
            work = weights_of(*(self._model.maps[step] for step in steps)).read(count)
            self._listener(ForwardEvent("drafter", shape, work, span.end()))


def _last(output: TargetOutput) -> dict[int, Tensor]:
    """Return the target's states of the last token that was read, by block; none where none was."""
    return {block: states[0, -1] for block, states in output.hidden_BTD.items() if states.shape[1]}
