"""Tensors that a drafter's file need not hold: copies of the target's, and computed buffers. Equal ones are dropped, others refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drafttrain.drafters.eagle.layer import Rotary
from drafttrain.drafters.eagle.layer_config import llama_config
from drafttrain.importers import Given
from drafttrain.importers.naming import without
from drafttrain.importers.target import TargetFiles

ANGLES = "rotary_emb.inv_freq"


def without_copies(
    given: Given, shared: Mapping[str, Tensor | None], target: TargetFiles
) -> tuple[Given, list[str], list[str]]:
    """Return (the folder without copies of the target's tensors, problems, notes).

    A drafter in drafttrain reads the target's tensor, so a copy that was trained further is refused.

    Args:
        shared: The target's tensor for each name; None if it was not found.
    """
    gone, found, notes = [], [], []
    for name, own in shared.items():
        tensor = given.tensors.get(name)
        if tensor is None:
            continue
        where = f"{given.files[name]}: {name}"
        gone.append(name)
        if own is None:
            found.append(f"{where}: cannot be compared: {target.name} has no such tensor under a known name")
        elif tensor.shape != own.shape:
            found.append(
                f"{where}: shape {list(tensor.shape)}, the target {target.name} has {list(own.shape)}: "
                "it was made for another target"
            )
        elif not torch.equal(tensor, own.to(tensor.dtype)):
            differ = int((tensor != own.to(tensor.dtype)).sum())
            found.append(
                f"{where}: {differ} of {own.numel()} values differ from {target.name}: drafters read the "
                "target's own tensor; give the target that it was made for"
            )
        else:
            notes.append(f"{name}: dropped, it equals the target's")
    return without(given, gone), found, notes


def without_angles(given: Given, fields: dict[str, Any]) -> tuple[Given, list[str]]:
    """Return (the folder without the rotary frequencies of older files, problems: those that differ from config.json)."""
    names = [name for name in given.tensors if name.endswith(ANGLES)]
    found = []
    for name in names:
        ours = Rotary(llama_config(fields)).frequencies
        theirs = given.tensors[name].to(ours)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=2e-2):
            found.append(
                f"{given.files[name]}: {name}: differs from the frequencies of rope_theta {fields['rope_theta']:g} and head_dim "
                f"{fields['head_dim']} in config.json"
            )
    return without(given, names), found
