"""DEL: after each round, choose the exit that drafts next and how many tokens, by what every exit would have drafted.

N = nodes whose successor is known, X = exits, D = hidden, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.generations import ForwardEvent, Generation
from drafttrain.core.probability import acceptance_rate
from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.roles import FirstBlocks, ForwardListener
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters.early_exit.proposer import EarlyExitProposer
from drafttrain.eval.proposers import Surroundings, proposers
from drafttrain.eval.proposers.early_exit import OwnBlocksSettings
from drafttrain.eval.proposers.exit_choice import SHADOWS, ExitCosts, ExitRecord, best_draft
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks

MOST_EXITS = 6
"""Exits that are chosen from if the settings name none."""


@dataclass
class DelSettings(OwnBlocksSettings):
    """The target's first blocks, as many as pay now, for as many tokens as pay now."""

    exits: list[int] = setting(
        [], help=f"Numbers of blocks to choose from; empty: {MOST_EXITS} at equal distances.", ge=1
    )
    every_rounds: int = setting(
        4,
        help="All exits are observed in one of this many rounds, and in each of the first ones: one call of the head for all "
        "of their rows.",
        ge=1,
    )
    decay: float = setting(0.9, help="Weight of an observed round in the next one.", gt=0, le=1)
    costs: Literal["measured", "blocks"] = setting(
        "measured",
        help="What a round costs. measured: seconds, from outputs that are decoded before; blocks: passes of a block, which is "
        "the same in every run.",
    )
    stops: bool = setting(
        True,
        help="End a draft where its exit is less sure than the middle between its accepted and its rejected tokens.",
    )
    warm: bool = setting(
        False, help="Continue with what was observed of the prompts before; else every prompt starts again."
    )


@proposers.register("del", DelSettings)
class DynamicExit(EarlyExitProposer):
    """The choice depends on past rounds alone, so the output distribution stays the target's. The length policy's budget is the upper limit.

    In the nodes of a round up to the first rejection, every exit sees the text that was committed. What it would have drafted
    there is its head's distribution of the states that drafting and verification have computed anyway. Its chance of acceptance
    is the overlap with the target's distribution: at temperature 0 whether both have the same likeliest token.
    Sequences that are decoded together share the choice.

    Source: Entezari Zarch et al. 2025, DEL, arXiv 2504.05598. How its threshold follows from confidences was not found in
    public text: the middle of the two means is this project's.
    """

    kind = "del"

    def __init__(self, settings: DelSettings, target: Target, listener: ForwardListener | None = None) -> None:
        total = len(blocks(target.model))
        self.exits = exits_of(total, settings.exits)
        super().__init__(target, exit_layer=self.exits[0], draft=settings.draft, listener=listener)
        self.settings = settings
        self._num_blocks = total
        self._vocab_size = target.vocab_size
        self._costs: ExitCosts | None = ExitCosts.in_blocks(self.exits, total) if settings.costs == "blocks" else None
        """None: not measured yet, so the exits take turns."""
        self._sampling = Sampling()
        self._observed = False
        self._passed: list[dict[int, list[Tensor]]] = []
        """By sequence and exit before the one that drafts, the states of the nodes of this round; if it is observed."""
        self.forget()

    @classmethod
    def create(cls, settings: DelSettings, surroundings: Surroundings) -> DynamicExit:
        """Return the proposer for this target."""
        return cls(settings, surroundings.target, surroundings.listener)

    def forget(self) -> None:
        """Start again. Costs stay as they were measured."""
        self.records = {one: ExitRecord(self.settings.decay) for one in self.exits}
        self._num_rounds = 0

    def share(self, target: FirstBlocks) -> None:
        """Store the target's first blocks, once each exit has been tried as a split."""
        for exit_layer in self.exits[1:]:
            target.split_at(exit_layer)
        self._exit_layer = self.exits[0]
        super().share(target)

    def calibrate(self, generations: Sequence[Generation], events: Sequence[ForwardEvent] = ()) -> None:
        """Take the costs of each exit from measured rounds, unless they are counted in blocks."""
        if self.settings.costs == "measured":
            found = ExitCosts.measured(self.exits, self._num_blocks, generations, events)
            self._costs = found or ExitCosts.in_blocks(self.exits, self._num_blocks)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new texts."""
        super().begin(contexts, seen)
        if not self.settings.warm:
            self.forget()

    def choice(self, most: int) -> tuple[int, int]:
        """Return the exit of the next round, and its number of draft tokens, of at most this many."""
        if self._costs is None:
            return self.exits[self._num_rounds % len(self.exits)], most
        known = {one: record.acceptance for one, record in self.records.items() if record.known}
        return best_draft(known, self._costs, most=most) if known else (self.exits[len(self.exits) // 2], min(1, most))

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one chain per sequence, by the exit that pays most."""
        self._sampling = sampling
        self._exit_layer, length = self.choice(max(min(one.nodes, one.depth) for one in budgets))
        self._blocks.move_split(self._exit_layer)
        number, every = self._num_rounds, self.settings.every_rounds
        self._observed = number < every or number % every == 0
        self._num_rounds += 1
        looked_at = self.exits if self._observed else []
        before = [one for one in looked_at if one < self._exit_layer]
        self._passed = [{one: [] for one in before} for _ in self._contexts]
        self.needs = TargetNeeds(hidden=tuple(one for one in looked_at if one > self._exit_layer))
        return super().propose([one.within(length) for one in budgets], sampling, generators, self._stopping(more))

    def _stopping(self, more: Callable[[DraftStep], bool | More]) -> Callable[[DraftStep], bool | More]:
        """Return the length policy's answer, or no where the exit is less sure than its threshold."""
        threshold = self.records[self._exit_layer].threshold if self.settings.stops and self._costs else 0.0

        def wanted(step: DraftStep) -> bool | More:
            return more(step) if not threshold or float(step.q_row_V.max()) >= threshold else False

        return wanted

    def _first_blocks(self, tokens: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        found = self._blocks.run_first_blocks(tokens, passed=list(self._passed[0]))
        for own, one in zip(self._passed, found, strict=True):
            for exit_layer, states in own.items():
                states += list(one.passed_ND[exit_layer])
        return [list(one.hidden_ND) for one in found]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Record what every exit would have drafted in this round, if it is an observed one."""
        if self._observed:
            self._record(verdicts, seen)
        self.needs = TargetNeeds()

    @torch.no_grad()
    def _record(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        counts = [min(len(one.path), len(one.tokens)) for one in verdicts]
        states_XND = torch.stack([self._states_of(one, counts, seen) for one in self.exits])
        _, logits_NV = self._head.read(states_XND.flatten(0, 1), num_sequences=len(counts), name=SHADOWS)
        vocabulary, size = self._draft.vocabulary, self._vocab_size
        drafting = Sampling() if self._draft.draft == "greedy" else self._sampling
        target_NV = vocabulary.probs(_logits(verdicts, counts, seen), self._sampling, size=size)
        drafter_XNV = vocabulary.probs(logits_NV, drafting, size=size).unflatten(0, states_XND.shape[:2])
        overlap_XN = acceptance_rate(target_NV, drafter_XNV)
        sure_N = vocabulary.logits(logits_NV).float().softmax(dim=-1).amax(dim=-1)
        # The device is read once.
        read = torch.stack([overlap_XN.double(), sure_N.double().unflatten(0, states_XND.shape[:2])], dim=1).tolist()
        for record, (accepted, sure) in zip(self.records.values(), read, strict=True):
            record.add(accepted, sure)

    def _states_of(self, exit_layer: int, counts: Sequence[int], seen: Sequence[TargetOutput]) -> Tensor:
        """Return states_ND of the accepted nodes, sequence by sequence: from drafting, or from the target's call."""
        if exit_layer > self._exit_layer:
            found = [one.hidden_BTD[exit_layer][0] for one in seen]
        else:
            found = [torch.stack(one) for one in self._drafted_states(exit_layer)]
        return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])

    def _drafted_states(self, exit_layer: int) -> list[list[Tensor]]:
        """Return the states of the nodes by sequence, of the exit that has drafted, or of one before it."""
        return self._states if exit_layer == self._exit_layer else [one[exit_layer] for one in self._passed]


def _logits(verdicts: Sequence[Verdict], counts: Sequence[int], seen: Sequence[TargetOutput]) -> Tensor:
    """Return the target's logits_NV after the accepted nodes whose successor was emitted."""
    rows = []
    for verdict, count, output in zip(verdicts, counts, seen, strict=True):
        assert output.logits_BTV is not None, "the target's call computes the logits of all nodes"
        rows.append(output.logits_BTV[0, list(verdict.path[:count])])
    return torch.cat(rows)


def exits_of(num_blocks: int, given: Sequence[int]) -> list[int]:
    """Return the exits to choose from, ascending: those of the settings, or some at equal distances.

    Raises:
        CheckpointError: The target has too few blocks for one.
    """
    if wrong := [one for one in given if one >= num_blocks]:
        raise CheckpointError(
            f"eval.beside: del: exits must be 1..{num_blocks - 1} for this target ({num_blocks} blocks), got {wrong}"
        )
    count = min(MOST_EXITS, num_blocks - 1)
    if not count:
        raise CheckpointError("eval.beside: del: a target of one block has no exit before its last block")
    return sorted({*given}) or [number * num_blocks // (count + 1) for number in range(1, count + 1)]
