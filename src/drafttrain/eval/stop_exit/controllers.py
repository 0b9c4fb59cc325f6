"""Who decides after each of some blocks: classifiers with thresholds, a fixed layer, or chance.

D = hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.core.weights import Weights, weights_of
from drafttrain.eval.stop_exit.classifier import Classifiers
from drafttrain.eval.stop_exit.labels import Action

NEVER = 2.0
"""A threshold that no chance reaches."""


class Controller(Protocol):
    """Decides after a layer whether the token goes on."""

    def begin(self, generator: torch.Generator) -> None:
        """Start a completion."""
        ...

    def decide(self, layer: int, normed_D: Tensor) -> Action:
        """Return what to do with the token that has passed this many blocks.

        Args:
            normed_D: Its state after the final norm.
        """
        ...

    def reads(self, layer: int) -> Weights:
        """Return the weights that a decision reads."""
        ...


@dataclass
class Whole:
    """Never exits, never stops: the target itself."""

    def begin(self, generator: torch.Generator) -> None:
        """Nothing changes between completions."""

    def decide(self, layer: int, normed_D: Tensor) -> Action:
        """Go on."""
        return Action.GO_ON

    def reads(self, layer: int) -> Weights:
        """Read nothing."""
        return Weights()


@dataclass
class FixedLayer(Whole):
    """Every token exits after the same blocks."""

    layer: int

    def decide(self, layer: int, normed_D: Tensor) -> Action:
        """Exit at the layer."""
        return Action.EXIT if layer == self.layer else Action.GO_ON


@dataclass
class ByChance(Whole):
    """Stops and exits after a layer with given chances, whatever the text."""

    rates: Mapping[int, tuple[float, float]]
    """By layer: the chances to stop and to exit of a token that comes so far."""
    _generator: torch.Generator = field(default_factory=torch.Generator)

    def begin(self, generator: torch.Generator) -> None:
        """Draw from this completion's own stream."""
        self._generator = generator

    def decide(self, layer: int, normed_D: Tensor) -> Action:
        """Draw."""
        drawn, (stop, exit) = float(torch.rand((), generator=self._generator)), self.rates.get(layer, (0.0, 0.0))
        return Action.STOP if drawn < stop else Action.EXIT if drawn < stop + exit else Action.GO_ON


@dataclass
class Thresholds(Whole):
    """Stops where the chance of that reaches a threshold, else exits where the chance of that does."""

    classifiers: Classifiers
    exit: float
    stop: float

    def decide(self, layer: int, normed_D: Tensor) -> Action:
        """Ask the layer's classifier."""
        stop_N, exit_N = self.classifiers.chances(layer, normed_D[None])
        if float(stop_N) >= self.stop:
            return Action.STOP
        return Action.EXIT if float(exit_N) >= self.exit else Action.GO_ON

    def reads(self, layer: int) -> Weights:
        """Read the layer's classifier."""
        return weights_of(self.classifiers.by_layer[str(layer)])
