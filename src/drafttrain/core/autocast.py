"""Frozen weights stay out of autocast.

Autocast would round a frozen float32 model to bfloat16, and cast its weights again in every forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast_if_frozen(weight: Tensor) -> AbstractContextManager[object]:
    """Return a context that turns autocast off if the weight is frozen, and changes nothing if it is trained."""
    kind = weight.device.type
    if weight.requires_grad or not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def in_own_precision(call: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Decorate a function of a causal LM: a frozen model computes in the type of its weights, whatever autocast says."""

    @wraps(call)
    def wrapped(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast_if_frozen(model.get_output_embeddings().weight):
            return call(model, *args, **kwargs)

    return wrapped
