"""The pipelined schedule: the drafter drafts the next tokens while the target verifies the last ones.

The decisions are made one after the other here, the same as on two devices; `clock.pipelined_seconds` has the times of two devices.

V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.proposals import Budget, Context, DraftStep, More, NodeKind, Proposal, Verdict, chain
from drafttrain.core.roles import DraftsAhead, Proposer
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling

Schedule = Literal["serial", "pipelined"]
SERIAL: Schedule = "serial"
PIPELINED: Schedule = "pipelined"


@dataclass
class _Draft:
    """Draft tokens of one sequence that the target has not verified, and what they were drawn from."""

    tokens: list[int] = field(default_factory=list)
    q_rows: list[Tensor] = field(default_factory=list)
    """Empty: the tokens are FIXED."""

    def __add__(self, other: _Draft) -> _Draft:
        return _Draft(self.tokens + other.tokens, self.q_rows + other.q_rows)

    def first(self, count: int) -> _Draft:
        return _Draft(self.tokens[:count], self.q_rows[:count])

    def after(self, count: int) -> _Draft:
        return _Draft(self.tokens[count:], self.q_rows[count:])


class Pipelined:
    """Proposes the pending tokens and the first one of those that are drafted meanwhile.

    In each round the drafter continues after the pending tokens as if they were accepted. The target's call reads the last committed
    token and the pending ones, so its rows verify these and the first new one, which it cannot have read. If all are accepted, the
    other new tokens are pending next; else they are dropped, and drafting starts again after the target's own token. So a draft
    runs on as long as it is accepted, and a round after a rejection verifies one token only.

    Args:
        drafts: Drafts from text alone, and can continue from any text.
        max_new_tokens: Of the engine: nothing is drafted past them.

    Source: Liu et al. 2024, PEARL, arXiv 2408.11850: verification before and after drafting are the rounds without and with pending
    tokens.
    """

    needs = TargetNeeds()

    def __init__(self, drafts: Proposer, *, max_new_tokens: int) -> None:
        if not isinstance(drafts, DraftsAhead):
            raise CheckpointError(
                "eval.schedule: pipelined needs a drafter with its own language model (causal_lm): others draft from states of the "
                "target, which do not exist while it still reads. Use serial"
            )
        self._drafts: DraftsAhead = drafts
        self._max_new_tokens = max_new_tokens
        self._contexts: list[Context] = []
        self._texts: list[Context] = []
        """The drafter's own: the committed text, then the pending tokens."""
        self._pending: list[_Draft] = []
        self._new: list[_Draft] = []
        self._drafted: list[Proposal] = []

    def why_one_at_a_time(self, longest: int) -> str | None:
        """Return why sequences must be drafted one at a time; None: they can be batched."""
        return self._drafts.why_one_at_a_time(longest)

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Read the prompts without their last tokens."""
        self._contexts = list(contexts)
        self._texts = [replace(context, tokens=list(context.tokens)) for context in contexts]
        self._pending = [_Draft() for _ in contexts]
        self._drafts.begin(self._texts, seen)

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Draft after the pending tokens; return a chain of these and the first new one."""
        if any(budget.width > 1 for budget in budgets):
            raise CheckpointError("eval.schedule: pipelined drafts chains only: use a length policy of width 1")
        budgets = [
            budget.within(self._left(context) - len(pending.tokens))
            for budget, context, pending in zip(budgets, self._contexts, self._pending, strict=True)
        ]
        self._drafted = self._drafts.propose(budgets, sampling, generators, more)
        self._new = [
            _Draft(one.tokens_N.tolist()[1:], [] if one.q_rows_RV is None else list(one.q_rows_RV))
            for one in self._drafted
        ]
        return [
            _proposal(context.tokens[-1], pending + new.first(1), unread_leaf=bool(new.tokens))
            for context, pending, new in zip(self._contexts, self._pending, self._new, strict=True)
        ]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Keep the other new tokens if all proposed ones were accepted."""
        self._pending = [
            new.after(1) if new.tokens and verdict.num_accepted == len(pending.tokens) + 1 else _Draft()
            for verdict, pending, new in zip(verdicts, self._pending, self._new, strict=True)
        ]
        texts = [
            [*context.tokens, *pending.tokens] for context, pending in zip(self._contexts, self._pending, strict=True)
        ]
        self._drafts.continue_from(texts, self._drafted)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._contexts = [self._contexts[i] for i in keep]
        self._texts = [self._texts[i] for i in keep]
        self._pending = [self._pending[i] for i in keep]
        self._drafts.drop(keep)

    def _left(self, context: Context) -> int:
        """Return how many draft tokens can still be committed before the target's own last one."""
        return max(0, self._max_new_tokens - (len(context.tokens) - context.num_prompt_tokens) - 1)


def _proposal(root: int, draft: _Draft, *, unread_leaf: bool) -> Proposal:
    kind = NodeKind.SAMPLED if draft.q_rows else NodeKind.FIXED
    rows_RV = torch.stack(draft.q_rows) if draft.q_rows else None
    return replace(chain([root, *draft.tokens], kind=kind, q_rows_RV=rows_RV), unread_leaf=unread_leaf)


def scheduled(schedule: Schedule, proposer: Proposer, *, max_new_tokens: int) -> Proposer:
    """Return the proposer as this schedule runs it."""
    return Pipelined(proposer, max_new_tokens=max_new_tokens) if schedule == PIPELINED else proposer
