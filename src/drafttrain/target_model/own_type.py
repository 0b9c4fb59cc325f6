"""A frozen model computes in the type of its weights, under the autocast of a training too."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from drafttrain.core.own_type import own_type

P = ParamSpec("P")
R = TypeVar("R")


def in_own_type(call: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Take a function of a model out of autocast where the model is frozen; one in training stays in it."""

    @wraps(call)
    def taken_out(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with own_type(model.get_output_embeddings().weight):
            return call(model, *args, **kwargs)

    return taken_out
