"""The tensors among the operands of an operation: they stand by themselves, or in lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return all of them, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Return the operands, or results, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(change, one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(change, one) for one in value)
    return value
