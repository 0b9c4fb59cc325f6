"""Runs only some of a model's blocks with the model's own forward: the others return their input.

B = sequences, N = nodes, D = hidden
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from drafttrain.target_model.anatomy import blocks, final_norm


@contextlib.contextmanager
def block_range(model: Any, running: range, *, entering_BND: Tensor | None = None) -> Iterator[None]:
    """Within this context the trunk runs only the blocks of `running`.

    Masks, positions and cache indices are the model's own, whatever its architecture: blocks keep their places in the
    list, and those outside the range return their input. If the range ends before the last block, the final norm also
    returns its input, so `last_hidden_state` is the state that enters block `running.stop`.

    Args:
        entering_BND: The state that enters block `running.start`; needed unless that is the first block.
    """
    stack = blocks(model)
    outside = [index for index in range(len(stack)) if index not in running]
    resting: list[nn.Module] = [stack[index] for index in outside]
    assert (entering_BND is None) == (running.start == 0), "only the first block reads tokens: any other needs states"
    if running.stop < len(stack):
        resting.append(final_norm(model))
    forwards: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(resting, _return_input)
    if entering_BND is not None:
        forwards[stack[running.start - 1]] = lambda *_, **__: entering_BND
    with replaced_forwards(forwards):
        yield


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of these modules within the context."""
    # Libraries that place a model on devices set a `forward` on the instance: it is restored.
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _return_input(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
