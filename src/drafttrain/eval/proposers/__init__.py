"""Training-free proposers, one file each: evaluated beside a drafter by `eval.beside`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from drafttrain.core.registry import Registry
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.target_model import Target

proposers = Registry("proposer", "drafttrain.eval.proposers")


@dataclass(frozen=True)
class TrainingFree:
    """Makes a training-free proposer where a drafter makes its own."""

    settings: Any

    @property
    def label(self) -> str:
        """Its kind, and the settings that differ from the default."""
        changed = {
            f.name: value for f in fields(self.settings) if (value := getattr(self.settings, f.name)) != f.default
        }
        return ", ".join([self.settings.kind, *(f"{name} {value}" for name, value in changed.items())])

    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the proposer; it runs no model that a listener could hear of."""
        found: Proposer = proposers.build(self.settings)
        return found
