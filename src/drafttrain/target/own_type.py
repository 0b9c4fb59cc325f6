"""A frozen model computes in the type of its weights: a training's autocast would round a float32 target, and cast its weights again each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_own_type(call: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Take a function of a model out of autocast where the model is frozen; one in training stays in it."""

    @wraps(call)
    def taken_out(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        weight = model.get_output_embeddings().weight
        kind = weight.device.type
        if weight.requires_grad or not torch.amp.is_autocast_available(kind):
            return call(model, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return call(model, *args, **kwargs)

    return taken_out
