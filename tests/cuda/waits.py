"""What makes the host wait for the device, and what is copied out of memory that is not pinned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cuda.happenings import happenings, note
from tests.cuda.operands import tensors_in
from tests.cuda.refusals import CPU, INDEXING

SIZES = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "equal": "equal",
    "bincount": "bincount",
}
"""Operations that read a number, or the size of their result, off the device."""


def count(name: str, args: Sequence[Any], kwargs: dict[str, Any], *, pinned: Callable[[Tensor], bool]) -> None:
    """Count what an operation on a device makes the host wait for."""
    happenings.operations += 1
    if name in ("_to_copy", "copy_"):
        _count_copy(name, args, kwargs, pinned)
    elif name in SIZES:
        note(happenings.waits, SIZES[name])
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        note(happenings.waits, "repeat_interleave")
    elif name in INDEXING:
        # One value at the places of a mask is a fill.
        filled = name.startswith("index_put") and args[2].numel() == 1
        for index in tensors_in(args[1]):
            if index.device == CPU:
                note(happenings.copies, "an index of the CPU")
            elif index.dtype in (torch.bool, torch.uint8) and not filled:
                note(happenings.waits, "boolean index")


def _count_copy(name: str, args: Sequence[Any], kwargs: dict[str, Any], pinned: Callable[[Tensor], bool]) -> None:
    into, source = (args[0].device, args[1]) if name == "copy_" else (_wanted(args[0], kwargs), args[0])
    waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if source.device == CPU and into != CPU:
        if not pinned(source):
            note(happenings.copies, "a copy of memory that is not pinned")
        elif waits:
            note(happenings.waits, "a copy to the device that is waited for")
    elif source.device != CPU and into == CPU and waits:
        note(happenings.waits, "a copy to the host")


def _wanted(source: Tensor, kwargs: dict[str, Any]) -> torch.device:
    device = kwargs.get("device")
    return source.device if device is None else torch.device(device)
