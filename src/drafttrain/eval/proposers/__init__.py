"""Proposers that need no training, one file each: evaluated beside a drafter by `eval.beside`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from drafttrain.core.registry import Registry
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.drafters import Drafter
from drafttrain.drafters.text_drafts import TextDrafts
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


class TextProposer(TextDrafts):
    """Base class of proposers that draft each text on its own: `start` returns the drafter of one text."""

    @classmethod
    def create(cls, settings: Any, surroundings: Surroundings) -> Proposer:
        """Return the proposer of these settings."""
        return cls(settings)  # type: ignore[call-arg]

    def forget(self) -> None:
        """Return to the state before the first prompt. By default there is none that lives across prompts."""
