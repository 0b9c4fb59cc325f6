"""A head in parts: the layers before its output matrix, the matrix, and the architecture's scale or soft cap.

A loss that knows the parts computes their gradients while a few rows of logits exist, and never needs the logits of all rows.

N = rows, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class LinearHead:
    """A `batches.Head` with one output matrix for each depth.

    Args:
        linear: Returns the `nn.Linear` of a depth.
        before: The layers that the states pass through first.
        after: Elementwise scale or soft cap of the logits.
    """

    def __init__(
        self,
        linear: Callable[[int], Any],
        *,
        before: nn.Module | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.linear = linear
        self.before = before
        self.after = after

    def __call__(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NV on the device of the states, even if the matrix is on another device.

        A frozen matrix multiplies in its own type, as the target's head does when the target reads and decodes.
        """
        linear = self.linear(depth)
        entering_ND = self.entering(states_ND).to(linear.weight.device, linear.weight.dtype)
        with no_autocast_if_frozen(linear.weight):
            logits_NV: Tensor = linear(entering_ND).to(states_ND.device)
        return logits_NV if self.after is None else self.after(logits_NV)

    def entering(self, states_ND: Tensor) -> Tensor:
        """Return the input of the matrix."""
        entering_ND: Tensor = states_ND if self.before is None else self.before(states_ND)
        return entering_ND

    def parameters(self, depth: int) -> list[Tensor]:
        """Return all weights of a depth: the matrix, its bias, then those of the layers before it."""
        linear = self.linear(depth)
        own = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        return own + ([] if self.before is None else list(self.before.parameters()))


def no_autocast_if_frozen(weight: Tensor) -> AbstractContextManager[object]:
    """Return a context that turns autocast off if the weight is frozen, and changes nothing if it is trained.

    Autocast would round a frozen float32 model to bfloat16, and cast its weights again in every forward.
    """
    return (
        nullcontext()
        if weight.requires_grad or not torch.amp.is_autocast_available(weight.device.type)
        else torch.autocast(weight.device.type, enabled=False)
    )
