"""What computes the target's hidden states for data.cache and training, one file a kind: this process, or an engine elsewhere.

L = layers, T = tokens, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from drafttrain.core.registry import Registry
from drafttrain.data_gen.backends import Task
from drafttrain.target_model import Target
from drafttrain.target_model.absent_target import AbsentTarget
from drafttrain.target_model.settings import TargetSettings

states = Registry("source of hidden states", "drafttrain.data_gen.states")


@dataclass(frozen=True)
class TextStates:
    """What an engine computed on one text."""

    layers_TLD: Tensor
    """The residual stream entering the requested blocks, in their order; block n: after the last one, before the final norm."""
    next_token: int
    """The likeliest token after the text, by the engine's own head."""


class StatesEngine(Protocol):
    """Runs the target's blocks somewhere else."""

    def read(self, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> Iterator[TextStates]:
        """Yield the states of each text, in order."""
        ...

    def close(self) -> None:
        """Release the engine; the next call of `read` starts it again."""
        ...


class StatesSource(Protocol):
    """A member of the registry: a kind of `data.states`."""

    elsewhere: bool
    """The target's blocks are not loaded in this process."""

    def __init__(self, settings: Any) -> None: ...

    def target(self, settings: TargetSettings, *, max_length: int, while_training: bool) -> AbsentTarget:
        """Return a target without its blocks.

        Args:
            max_length: Tokens of the longest text, as far as the recipe shows.
            while_training: Every step will read it: nothing is cached.
        """
        ...

    def continued(
        self,
        tasks: Sequence[Task],
        target: Target,
        *,
        max_new_tokens: int,
        seed: int,
        written: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Return the target's continuation of each validation prompt; all tasks share one sampling rule.

        Args:
            target: This source's target, or one that is spread over the processes.
            written: Called with the number of new tokens.
        """
        ...
