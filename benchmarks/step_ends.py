"""When the steps of a training end: the clock after each step of the optimizer.

Batches are requested ahead of their steps, so the times of these requests are no times of steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.optim.optimizer import register_optimizer_step_post_hook


@contextmanager
def step_ends(clock: Callable[[], float]) -> Iterator[list[float]]:
    """Within this context, the clock is read after each step of any optimizer, into this list."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(clock()))
    try:
        yield ends
    finally:
        hook.remove()
