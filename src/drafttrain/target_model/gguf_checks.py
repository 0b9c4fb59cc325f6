"""Checks that a GGUF file can be read here. If not, one sentence names the file, the reason, and what to give instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.gguf_header import GgufHeader, StoredTensor, read_header

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
INSTEAD = "give the model's folder or hub id"


def readable_header(path: Path) -> GgufHeader:
    """Return the header of a file that can be read here.

    Raises:
        CheckpointError: It cannot be.
    """
    if part := PART.search(path.name):
        raise CheckpointError(
            f"{path}: is part {int(part[1])} of {int(part[2])} of a split model: merge the parts with llama.cpp's "
            "llama-gguf-split --merge FIRST_PART OUT.gguf, and give OUT.gguf"
        )
    header = read_header(path)
    try:
        package()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if reason := _not_a_model(header) or _unreadable_types(header) or _truncated(header):
        raise CheckpointError(f"{path}: {reason}")
    return header


def package() -> Any:
    """Return the package `gguf`.

    Raises:
        CheckpointError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("GGUF needs the package gguf: pip install gguf") from error
    return gguf


def read_by_transformers() -> dict[str, Mapping[str, str | None]]:
    """Return the settings that transformers reads from GGUF files, by architecture: its own field for each key."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    read: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    return {name: read[name] for name in sorted(read) if name not in ("general", "tokenizer")}


def names_of(architecture: str) -> set[str]:
    """Return the names that transformers may have for an architecture of llama.cpp."""
    name = architecture.replace("-", "_")
    return {name, name.replace("moe", "_moe")}


def _not_a_model(header: GgufHeader) -> str | None:
    kind = header.settings.get("general.type", "model")
    if kind != "model":
        return f"holds no model (its general.type is {kind!r}): {INSTEAD}"
    if header.settings.get("split.count", 1) > 1:
        return f"is one of {header.settings['split.count']} parts of a split model: merge them with llama-gguf-split --merge"
    if "general.architecture" not in header.settings or not header.tensors:
        return "holds no model (it has no architecture or no tensors)"
    if names_of(header.architecture).isdisjoint(known := read_by_transformers()):
        return (
            f"transformers cannot read the architecture {header.architecture!r} from GGUF files, only {', '.join(known)}: "
            f"{INSTEAD}"
        )
    return None


def _unreadable_types(header: GgufHeader) -> str | None:
    gguf = package()
    types = {number: _name(gguf, number) for number in {tensor.type for tensor in header.tensors}}
    refused = sorted(name for number, name in types.items() if not _dequantizes(gguf, number))
    if not refused:
        return None
    example = next(tensor.name for tensor in header.tensors if types[tensor.type] == refused[0])
    return f"its tensors of type {', '.join(refused)} (such as {example}) cannot be dequantized: {INSTEAD}"


def _name(gguf: Any, number: int) -> str:
    try:
        return str(gguf.GGMLQuantizationType(number).name)
    except ValueError:
        return f"number {number}"


def _dequantizes(gguf: Any, number: int) -> bool:
    """Return whether the package turns a type into numbers, by trying one block of zeros."""
    try:
        kind = gguf.GGMLQuantizationType(number)
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return False
    return True


def _truncated(header: GgufHeader) -> str | None:
    size = header.path.stat().st_size
    needed = max(tensor.start + _num_bytes(tensor) for tensor in header.tensors)
    if size >= needed:
        return None
    return f"is truncated: it has {size:,} of {needed:,} bytes. Fetch it again"


def _num_bytes(tensor: StoredTensor) -> int:
    gguf = package()
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
    return int(tensor.num_values // block * block_bytes)
