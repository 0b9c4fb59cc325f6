"""The tensors of a next-token-prediction layer in its target's checkpoint: reading them, and replacing them in a copy.

E = experts, I = feed-forward width, D = hidden
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.errors import CheckpointError
from drafttrain.core.tensors import TensorFiles, read_tensors
from drafttrain.drafters.mtp.layouts import Layout

EXPERTS = "block.mlp.experts."
GATE_UP, DOWN = f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj"
"""Own names of the experts' matrices, gate_up_E(2I)D and down_EDI. A checkpoint stores each expert's by itself."""

NOT_LINKED = (".json", ".jinja", ".txt", ".model", ".md", ".py")
"""Small files are copied, so that an edit does not reach the target's folder."""


def stored_names(files: TensorFiles, layout: Layout, num_blocks: int) -> dict[str, str]:
    """Return the full name of each of the layer's tensors by its name without prefix. Copies of shared tensors are left out."""
    prefix = layout.prefix_for(num_blocks)
    named = {name.removeprefix(prefix): name for name in files.names() if name.startswith(prefix)}
    return {short: name for short, name in named.items() if short not in layout.copies}


def read_layer(files: TensorFiles, layout: Layout, num_blocks: int) -> dict[str, Tensor]:
    """Return the layer's tensors by the drafter's own names.

    Raises:
        CheckpointError: They are quantized.
    """
    stored = {short: files.read(name) for short, name in stored_names(files, layout, num_blocks).items()}
    quantized = [short for short, tensor in stored.items() if tensor.is_floating_point() and tensor.itemsize < 2]
    if quantized or any(short.endswith("_scale_inv") for short in stored):
        raise CheckpointError(
            f"{files.folder}: its next-token-prediction layer is quantized ({(quantized or list(stored))[0]}): give the "
            "weights from before quantization"
        )
    return own_tensors(stored, layout)


def own_tensors(stored: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return tensors under the drafter's own names, from those of a checkpoint without their prefix."""
    named = {layout.own(short): tensor for short, tensor in stored.items()}
    single = {name: tensor for name, tensor in named.items() if name.startswith(EXPERTS)}
    if not single:
        return named
    count = 1 + max(int(name.removeprefix(EXPERTS).split(".")[0]) for name in single)

    def all_of(kind: str) -> Tensor:
        return torch.stack([single[f"{EXPERTS}{expert}.{kind}_proj.weight"] for expert in range(count)])

    whole = {GATE_UP: torch.cat([all_of("gate"), all_of("up")], dim=1), DOWN: all_of("down")}
    return {name: tensor for name, tensor in named.items() if name not in single} | whole


def checkpoint_tensors(own: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return tensors under the checkpoint's names without prefix: the inverse of `own_tensors`."""
    stored = {layout.stored(name): tensor for name, tensor in own.items() if name not in (GATE_UP, DOWN)}
    if GATE_UP in own:
        prefix = layout.stored(EXPERTS)
        for expert, (gate_up, down_DI) in enumerate(zip(own[GATE_UP], own[DOWN], strict=True)):
            gate_ID, up_ID = gate_up.chunk(2)
            parts = {"gate": gate_ID, "up": up_ID, "down": down_DI}
            stored |= {f"{prefix}{expert}.{kind}_proj.weight": tensor for kind, tensor in parts.items()}
    return stored


def stitch(target: Path, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a copy of a target's checkpoint in which these tensors are replaced; the target's folder does not change.

    Files without a replaced tensor are hard links where the file system allows it, else copies. A replaced tensor gets the
    type that it has in the target's file.

    Args:
        tensors: By their full names in the checkpoint.
        folder: An empty folder.

    Raises:
        CheckpointError: A tensor is not in the checkpoint, or has another shape there.
    """
    left = dict(tensors)
    for path in sorted(target.iterdir()):
        if path.is_dir():
            continue
        inside = _names_in(path) & left.keys() if path.suffix == ".safetensors" else set()
        if inside:
            _replace_in(path, {name: left.pop(name) for name in inside}, folder / path.name)
        else:
            _link_or_copy(path, folder / path.name)
    if left:
        raise CheckpointError(f"{target}: has no tensor {', '.join(sorted(left)[:5])} to replace")


def _names_in(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _replace_in(path: Path, tensors: Mapping[str, Tensor], out: Path) -> None:
    held = read_tensors(path)
    for name, tensor in tensors.items():
        if held[name].shape != tensor.shape:
            raise CheckpointError(f"{path}: {name}: shape {list(held[name].shape)}, not {list(tensor.shape)}")
        held[name] = tensor.to(held[name].dtype).contiguous()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(held, out, metadata=metadata or {"format": "pt"})


def _link_or_copy(path: Path, out: Path) -> None:
    if path.suffix not in NOT_LINKED:
        try:
            # A file of a hub's cache is a link itself: link what it points to.
            os.link(path.resolve(), out)
            return
        except OSError:
            pass
    shutil.copyfile(path, out)
