"""Some of a model's blocks alone, by the model's own forward: the others pass on what they are given.

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
    """Within this context the trunk runs the blocks of `running` alone.

    Masks, positions and cache indices stay the model's own business, whatever its architecture: blocks keep their places
    in the list, those outside the range only hand their input on. Where the range ends before the last block, the final
    norm hands on too, so that `last_hidden_state` is the state that enters block `running.stop`.

    Args:
        entering_BND: What enters block `running.start`; needed where that is not the first.
    """
    stack = blocks(model)
    outside = [index for index in range(len(stack)) if index not in running]
    resting: list[nn.Module] = [stack[index] for index in outside]
    assert (entering_BND is None) == (running.start == 0), "the first block reads tokens, every later one stored states"
    if running.stop < len(stack):
        resting.append(final_norm(model))
    forwards: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(resting, _hand_on)
    if entering_BND is not None:
        forwards[stack[running.start - 1]] = lambda *_, **__: entering_BND
    with replaced_forwards(forwards):
        yield


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within this context these modules compute something else."""
    # Libraries that place a model on devices keep a `forward` of their own on the module: it comes back.
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


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
