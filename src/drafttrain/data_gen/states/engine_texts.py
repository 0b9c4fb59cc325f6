"""Texts by the engine that computes the hidden states, through the backends of `data.generate`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from drafttrain.core.console import Progress
from drafttrain.core.errors import DataError
from drafttrain.data_gen.backends import Backend, Plan, Task
from drafttrain.target_model import Target


def continued_by(
    backend: Callable[[Plan], Backend],
    tasks: Sequence[Task],
    target: Target,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
    written: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the target's continuation of each prompt by a backend.

    Args:
        written: Called with the number of new tokens.

    Raises:
        DataError: A text is not whole.
    """
    with tempfile.TemporaryDirectory(prefix="drafttrain-") as folder:
        plan = Plan(target, Path(folder), max_new_tokens, batch_size, seed)
        ((_, outcomes),) = backend(plan).write({0: tasks}, Progress("", None, "texts"))
    found = []
    for task, outcome in zip(tasks, outcomes, strict=True):
        if outcome.tokens is None:
            raise DataError(f"data.states: the engine's text after prompt {task.id} cannot be used: {outcome.reason}")
        found.append(list(outcome.tokens))
    if written is not None:
        written(sum(map(len, found)))
    return found
