"""Tensors of somebody else's file under our names: every one is known, there once, and of the shape that config.json gives."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.export.layout import Shapes
from drafttrain.importers import Given

WHOLE_NUMBERS = ("d2t", "t2d")
"""Tensors that are no weights."""

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights; others are quantized."""

Rename = Callable[[str], str]


def renamed(given: Given, shapes: Shapes, *, ours: Rename, theirs: Rename) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under our names, and what is wrong with them.

    Args:
        shapes: What must be there, by our names.
        ours: Our name of one of the file's; unknown ones stay what they are.
        theirs: The file's name of one of ours, for the messages.
    """
    tensors: dict[str, Tensor] = {}
    found, unknown = [], []
    came_from: dict[str, str] = {}
    for name, tensor in given.tensors.items():
        where, own = f"{given.files[name]}: {name}", ours(name)
        if own not in shapes:
            unknown.append(name)
        elif own in tensors:
            found.append(f"{where}: is the same as {came_from[own]}: one of them must go")
        else:
            tensors[own], came_from[own] = tensor, name
            if tuple(tensor.shape) != shapes[own]:
                found.append(f"{where}: shape {list(tensor.shape)}, must be {list(shapes[own])}")
            elif own not in WHOLE_NUMBERS and tensor.dtype not in TYPES:
                found.append(f"{where}: is {tensor.dtype}, must be one of {', '.join(map(str, TYPES))}")
    missing = [name for name in shapes if name not in tensors]
    found += [f"{given.weights}: {theirs(name)}: missing, must be of shape {list(shapes[name])}" for name in missing]
    allowed = [theirs(name) for name in shapes]
    for name in unknown:
        near = difflib.get_close_matches(name, [theirs(one) for one in missing], n=1)
        found.append(
            f"{given.files[name]}: {name}: this layout has no such tensor" + (f"; is it {near[0]}?" if near else "")
        )
    if unknown:
        found.append(f"allowed with this config.json: {_listed(allowed)}")
    return tensors, found


def without(given: Given, names: Iterable[str]) -> Given:
    """Return the folder without these tensors, which were accounted for."""
    gone = set(names)
    return replace(given, tensors={name: tensor for name, tensor in given.tensors.items() if name not in gone})


def _listed(names: list[str]) -> str:
    shown = names[:40]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
