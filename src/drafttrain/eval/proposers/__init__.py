"""Proposers that need no training, one file each: evaluated beside a drafter by `eval.beside`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from drafttrain.core.proposals import Budget, Context, DraftStep, More, Proposal, Verdict
from drafttrain.core.registry import Registry
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import TargetNeeds, TargetOutput
from drafttrain.core.texts import Sampling
from drafttrain.drafters import Drafter
from drafttrain.target_model import Target

proposers = Registry("proposer", "drafttrain.eval.proposers")


@dataclass(frozen=True)
class Surroundings:
    """What a proposer may be made from, besides its settings."""

    target: Target
    drafter: Drafter | None = None
    """The drafter that is evaluated."""
    listener: ForwardListener | None = None


@dataclass(frozen=True)
class TrainingFree:
    """Makes a training-free proposer where a drafter makes its own."""

    settings: Any
    drafter: Drafter | None = None
    """The drafter that is evaluated: some proposers use it too."""

    @property
    def label(self) -> str:
        """Its kind, and the settings that differ from the default."""
        return label_of(self.settings)

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer."""
        found: Proposer = make(self.settings, Surroundings(target, self.drafter, listener))
        return found


def make(settings: Any, surroundings: Surroundings) -> Proposer:
    """Return the proposer of these settings."""
    found: Proposer = proposers.entry(settings.kind).component.create(settings, surroundings)  # type: ignore[attr-defined]
    return found


def label_of(settings: Any) -> str:
    """Return the kind of a proposer, and the settings that differ from the default."""
    default = type(settings)()
    changed = [
        (f.name, value) for f in fields(settings) if (value := getattr(settings, f.name)) != getattr(default, f.name)
    ]
    words = [f"{name} {label_of(value) if hasattr(value, 'kind') else value}" for name, value in changed]
    return ", ".join([settings.kind, *words])


def is_warm(settings: Any) -> bool:
    """Return whether a proposer keeps a state from prompt to prompt."""
    values = [getattr(settings, f.name) for f in fields(settings)]
    return bool(getattr(settings, "warm", False)) or any(is_warm(one) for one in values if hasattr(one, "kind"))


class TextDraft(Protocol):
    """Drafts the continuation of one text."""

    def draft(self, budget: Budget, generator: torch.Generator) -> Proposal:
        """Return a proposal of FIXED nodes. Random choices use this generator, which decides nothing else."""
        ...

    def learn(self, verdict: Verdict, logits_NV: Tensor) -> None:
        """Read what the target computed in this round: the logits after every node of the verified proposal."""
        ...


class TextProposer:
    """Base class of proposers that draft each text on its own: `start` returns the drafter of one text."""

    needs = TargetNeeds()

    @classmethod
    def create(cls, settings: Any, surroundings: Surroundings) -> Proposer:
        """Return the proposer of these settings."""
        return cls(settings)  # type: ignore[call-arg]

    def start(self, context: Context) -> TextDraft:
        """Return the drafter of a new text, whose tokens are appended to the context."""
        raise NotImplementedError

    def begin(self, contexts: Sequence[Context], seen: Sequence[TargetOutput]) -> None:
        """Start on new texts."""
        self._texts = [self.start(context) for context in contexts]

    def propose(
        self,
        budgets: Sequence[Budget],
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        more: Callable[[DraftStep], bool | More],
    ) -> list[Proposal]:
        """Return one proposal a text. There is no distribution, so length policies cannot stop it early."""
        return [
            text.draft(budget, generator)
            for text, budget, generator in zip(self._texts, budgets, generators, strict=True)
        ]

    def observe(self, verdicts: Sequence[Verdict], seen: Sequence[TargetOutput]) -> None:
        """Let every text learn from its round."""
        for text, verdict, output in zip(self._texts, verdicts, seen, strict=True):
            assert output.logits_BTV is not None, "the target's call computes the logits of all nodes"
            text.learn(verdict, output.logits_BTV[0])

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only these texts."""
        self._texts = [self._texts[i] for i in keep]

    def forget(self) -> None:
        """Return to the state before the first prompt. By default there is none that lives across prompts."""
