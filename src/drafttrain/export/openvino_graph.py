"""OpenVINO's files, written in its own environment and read without it: an XML graph, and a file of its constants in a row.

A matrix keeps the name that its module had. A vector is a constant without a name; it gets the name of the module that multiplies by
it or adds it.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.environments.environment import ask
from drafttrain.environments.known import OPENVINO

WORKER = Path(__file__).with_name("openvino_worker.py")
GRAPH = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"
TYPES = {"f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32}
NAMED = "self."
MODULE = re.compile(r"__module\.(.+)/aten::(\w+)/")
LEAVES = {"Multiply": "weight", "Add": "bias"}


def write_graph(source: Path, folder: Path, *, taps: Sequence[int] | None = None) -> None:
    """Convert a Hugging Face folder, of a target or a drafter, to OpenVINO's files in float32, in OpenVINO's environment.

    Args:
        taps: EAGLE-3 only: the blocks of the target whose outputs it reads.

    Raises:
        EngineError: OpenVINO is not installed here, or cannot convert this folder.
    """
    request = {
        "source": str(source.resolve()),
        "folder": str(folder.resolve()),
        "taps": None if taps is None else list(taps),
    }
    ask(OPENVINO, WORKER, request)


def read_graph(folder: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return the rt_info of a graph, and its weights by the names of their modules.

    Raises:
        CheckpointError: The files are not a graph and its constants, or are truncated.
    """
    path = folder / GRAPH
    try:
        graph = ElementTree.parse(path).getroot()
        constants = (folder / WEIGHTS).read_bytes()
    except (OSError, ElementTree.ParseError) as error:
        raise CheckpointError(f"{path}: not an OpenVINO graph: {error}") from error
    layers = {layer.get("id"): layer for layer in graph.iter("layer")}
    readers: dict[str | None, list[ElementTree.Element]] = {}
    for edge in graph.iter("edge"):
        readers.setdefault(edge.get("from-layer"), []).append(layers[edge.get("to-layer")])
    tensors = {}
    for number, layer in layers.items():
        name = _name_of(layer, readers.get(number, []))
        data = layer.find("data")
        if layer.get("type") == "Const" and name and data is not None:
            tensors[name] = _value(data.attrib, constants, name, folder)
    notes = {note.tag: note.get("value", "") for part in graph.findall("rt_info") for note in part}
    return notes, tensors


def _name_of(layer: ElementTree.Element, readers: list[ElementTree.Element]) -> str | None:
    name = layer.get("name", "")
    if name.startswith(NAMED):
        return name.removeprefix(NAMED)
    if "rotary_emb" in name and name.endswith("Convert"):
        return "rotary_emb.inv_freq"
    data = layer.find("data")
    if data is None or "," not in data.get("shape", "") or not data.get("element_type", "").startswith("f"):
        return None
    for reader in readers:
        module, leaf = MODULE.match(reader.get("name", "")), LEAVES.get(reader.get("type", ""))
        if module and leaf and int(data.get("size", "0")) > np.dtype(TYPES["f32"]).itemsize:
            return f"{module[1]}.{leaf}"
    return None


def _value(data: Mapping[str, str], constants: bytes, name: str, folder: Path) -> torch.Tensor:
    start, size = int(data["offset"]), int(data["size"])
    kind = TYPES.get(data["element_type"])
    if kind is None:
        raise CheckpointError(
            f"{folder / GRAPH}: {name} is of type {data['element_type']}, must be one of {', '.join(TYPES)}"
        )
    if start + size > len(constants):
        raise CheckpointError(
            f"{folder / WEIGHTS}: the weights cannot be read: {name} ends at byte {start + size}, the file at {len(constants)}"
        )
    shape = [int(side) for side in data["shape"].split(",")]
    value = torch.from_numpy(np.frombuffer(constants[start : start + size], dtype=kind).copy()).reshape(shape)
    # A vector is stored with an axis of length one for each axis that it is broadcast over.
    return value.reshape(-1) if value.numel() == max(shape) else value
