"""GGUF files: metadata by key and tensors by name, written and read with PyPI's package `gguf`.

GGUF lists the fastest dimension of a tensor first; here it comes last, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.target_model.gguf_checks import package

FILE = "model.gguf"
"""Name of the file in an exported folder."""

VERSION = "GGUF."
"""Prefix of the keys that the reader itself adds to the metadata."""


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file.

    Args:
        metadata: Texts, booleans, integers (stored as uint32), floats (float32) and lists; `general.architecture` is required.
        tensors: float32, float16 or bfloat16.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != "general.architecture":
            adders.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            bits = tensor.contiguous().view(torch.int16).numpy()
            writer.add_tensor(name, bits, raw_shape=bits.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the metadata and the tensors of a file.

    Raises:
        CheckpointError: It is missing, damaged or quantized.
    """
    gguf = package()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read as a GGUF file: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(VERSION)}
    return metadata, {tensor.name: _tensor(path, tensor) for tensor in reader.tensors}


def _tensor(path: Path, stored: Any) -> torch.Tensor:
    kind, shape = stored.tensor_type.name, [int(size) for size in reversed(stored.shape)]
    if kind == "BF16":
        return torch.from_numpy(np.array(stored.data).view(np.int16)).view(torch.bfloat16).reshape(shape)
    if kind not in ("F32", "F16"):
        raise CheckpointError(f"{path}: {stored.name}: is of type {kind}, must be F32, F16 or BF16")
    return torch.from_numpy(np.array(stored.data)).reshape(shape)
