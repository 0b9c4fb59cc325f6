"""Frozen weights multiply in their own type: a training's autocast would round those of float32, and cast them again each time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def own_type(weight: Tensor) -> AbstractContextManager[object]:
    """Return a context out of autocast where the weight is frozen; one in training stays in it."""
    kind = weight.device.type
    if weight.requires_grad or not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
