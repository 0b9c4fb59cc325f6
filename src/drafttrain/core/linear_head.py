"""A head in parts: the layers before its output matrix, the matrix, the architecture's scale or soft cap, and a second matrix.

A loss that knows the parts computes their gradients while a few rows of logits exist, and never needs the logits of all rows.

N = rows, V = vocabulary, D = hidden, r = columns of the second matrix
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
        added: A layer without bias for the last columns of the states, whose product is added to the logits at the end.
    """

    def __init__(
        self,
        linear: Callable[[int], Any],
        *,
        before: nn.Module | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
        added: nn.Linear | None = None,
    ) -> None:
        self.linear = linear
        self.before = before
        self.after = after
        self.added = added

    def __call__(self, states_ND: Tensor, depth: int) -> Tensor:
        """Return logits_NV on the device of the states, even if the matrix is on another device.

        A frozen matrix multiplies in its own type, as the target's head does when the target reads and decodes.
        """
        linear = self.linear(depth)
        own_ND, added_Nr = self.split(states_ND)
        entering_ND = self.entering(own_ND).to(linear.weight.device, linear.weight.dtype)
        with no_autocast_if_frozen(linear.weight):
            logits_NV: Tensor = linear(entering_ND).to(states_ND.device)
        logits_NV = logits_NV if self.after is None else self.after(logits_NV)
        return logits_NV if self.added is None else logits_NV + self.added(added_Nr)

    def split(self, states_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the columns of (the output matrix, the added one)."""
        if self.added is None:
            return states_ND, None
        own_ND, added_Nr = states_ND.tensor_split([states_ND.shape[-1] - self.added.in_features], dim=-1)
        return own_ND, added_Nr

    def entering(self, states_ND: Tensor) -> Tensor:
        """Return the input of the matrix."""
        entering_ND: Tensor = states_ND if self.before is None else self.before(states_ND)
        return entering_ND

    def matrices(self, depth: int) -> list[Tensor]:
        """Return the weights that make logits of a depth: the matrix, its bias, the added matrix."""
        linear = self.linear(depth)
        own = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        return own if self.added is None else [*own, self.added.weight]

    def parameters(self, depth: int) -> list[Tensor]:
        """Return all weights of a depth, those of the layers before the matrix last."""
        return self.matrices(depth) + ([] if self.before is None else list(self.before.parameters()))


def no_autocast_if_frozen(weight: Tensor) -> AbstractContextManager[object]:
    """Return a context that turns autocast off if the weight is frozen, and changes nothing if it is trained.

    Autocast would round a frozen float32 model to bfloat16, and cast its weights again in every forward.
    """
    return (
        nullcontext()
        if weight.requires_grad or not torch.amp.is_autocast_available(weight.device.type)
        else torch.autocast(weight.device.type, enabled=False)
    )
