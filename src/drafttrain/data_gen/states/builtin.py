"""Hidden states by the target in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.states import states
from drafttrain.target_model import Target
from drafttrain.target_model.absent_target import AbsentTarget
from drafttrain.target_model.settings import TargetSettings


@dataclass
class BuiltinStates:
    """The target computes them in this process; train.target_placement says where its weights are."""


@states.register("builtin", BuiltinStates)
class BuiltinSource:
    """Loads the whole target while outputs are missing."""

    elsewhere = False

    def __init__(self, settings: BuiltinStates) -> None:
        del settings

    def target(self, settings: TargetSettings, *, max_length: int, while_training: bool) -> AbsentTarget:
        """Return a target that loads its blocks where they are needed."""
        del max_length, while_training
        return AbsentTarget.load(settings)

    def continued(
        self,
        tasks: Sequence[Task],
        target: Target,
        *,
        max_new_tokens: int,
        seed: int,
        written: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Return the target's continuations by built-in decoding.

        Every process generates all of them: they are few, and a sharded target needs every process.
        """
        with target.for_own_share() as live:
            return continuations(tasks, live, max_new_tokens=max_new_tokens, seed=seed, written=written)
