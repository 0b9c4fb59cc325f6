"""Activation checkpointing: a part of a forward stores its inputs only, and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def run_part(part: Callable[..., Result], *inputs: Tensor, recompute: bool, **others: Any) -> Result:
    """Return part(*inputs, **others).

    Args:
        part: A pure function of its inputs and of tensors that it refers to, which are stored anyway.
        others: Further arguments of it.
        recompute: Store no activations of it. Without gradients nothing is stored in either case.
    """
    if recompute and torch.is_grad_enabled():
        again: Result = checkpoint(part, *inputs, use_reentrant=False, **others)
        return again
    return part(*inputs, **others)
