"""Rename the tensors of a foreign file to drafttrain's names; each must be known, unique and of the shape in config.json."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.export.layout import Shapes
from drafttrain.importers import Given

WHOLE_NUMBERS = ("d2t", "t2d", "token_map")
"""Tensors that are not weights."""

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of weights; others are quantized."""

WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|draft_model|eagle_module|model)\.)+")
"""Prefixes that distributed training, compilation and wrapping models put before the names of a drafter."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")

Rename = Callable[[str], str]


def renamed(given: Given, shapes: Shapes, *, ours: Rename, theirs: Rename) -> tuple[dict[str, Tensor], list[str]]:
    """Return (the tensors under drafttrain's names, problems).

    Args:
        shapes: The shapes of all required tensors, by drafttrain's names.
        ours: From a name of the file to drafttrain's; unknown names are returned unchanged.
        theirs: From drafttrain's name to the file's, for messages.
    """
    tensors: dict[str, Tensor] = {}
    found, unknown = [], []
    came_from: dict[str, str] = {}
    for name, tensor in given.tensors.items():
        where, own = f"{given.files[name]}: {name}", ours(name)
        if own not in shapes:
            unknown.append(name)
        elif own in tensors:
            found.append(f"{where}: is the same tensor as {came_from[own]}: remove one of them")
        else:
            tensors[own], came_from[own] = tensor, name
            if tuple(tensor.shape) != shapes[own]:
                found.append(f"{where}: shape {list(tensor.shape)}, must be {list(shapes[own])}")
            elif own not in WHOLE_NUMBERS and tensor.dtype not in TYPES:
                found.append(f"{where}: is {tensor.dtype}, must be one of {', '.join(map(str, TYPES))}")
    missing = [name for name in shapes if name not in tensors]
    found += [f"{given.weights}: {line}" for line in _grouped({theirs(name): shapes[name] for name in missing})]
    for pattern, names in _patterns(unknown).items():
        near = difflib.get_close_matches(names[0], [theirs(one) for one in missing], n=1)
        found.append(
            f"{given.files[names[0]]}: {pattern}: this layout has no such tensor"
            + (f" ({len(names)} of them)" if len(names) > 1 else "")
            + (f". Did you mean {near[0]}?" if near else "")
        )
    if unknown:
        found.append(f"allowed with this config.json: {listed(list(_patterns(map(theirs, shapes))))}")
    return tensors, found


def unwrapped(given: Given) -> Given:
    """Return the folder with the names of the drafter's own modules, without the prefixes of wrappers.

    If two tensors would get the same name, no name is changed.
    """
    own = {name: WRAPPERS.sub("", name) for name in given.tensors}
    if len(set(own.values())) < len(own) or all(name == short for name, short in own.items()):
        return given
    tensors = {own[name]: tensor for name, tensor in given.tensors.items()}
    files = {own[name]: file for name, file in given.files.items()}
    return replace(given, tensors=tensors, files=files)


def _patterns(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by their pattern, with `*` for numbers: `layers.*.mlp.up_proj.weight`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(NUMBER.sub("*", name), []).append(name)
    return {pattern if len(names) > 1 else names[0]: names for pattern, names in found.items()}


def _grouped(missing: dict[str, tuple[int, ...]]) -> list[str]:
    """Return one line for every pattern of names that are missing."""
    return [
        f"{pattern}: missing, must be of shape {list(missing[names[0]])}"
        + (f" ({len(names)} of them)" if len(names) > 1 else "")
        for pattern, names in _patterns(missing).items()
    ]


def without(given: Given, names: Iterable[str]) -> Given:
    """Return the folder without these tensors."""
    gone = set(names)
    return replace(given, tensors={name: tensor for name, tensor in given.tensors.items() if name not in gone})


def listed(names: list[str]) -> str:
    """Return a list of names for a message, at most 40 of them."""
    shown = names[:40]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
