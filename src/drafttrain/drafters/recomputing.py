"""Activation checkpointing: a part of a forward stores its inputs only, and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def run_part(part: Callable[..., Result], *inputs: Tensor, recompute: bool) -> Result:
    """Return part(*inputs).

    Args:
        part: A pure function of its inputs and of tensors that it refers to, which are stored anyway.
        recompute: Store no activations of it. Without gradients nothing is stored in either case.
    """
    if recompute and torch.is_grad_enabled():
        again: Result = checkpoint(part, *inputs, use_reentrant=False)
        return again
    return part(*inputs)
