"""GGUF files of tiny models, for tests: exact, quantized, and with any change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from drafttrain.export.gguf import write_model
from drafttrain.export.gguf_file import read_gguf, write_gguf
from drafttrain.export.gguf_tokenizer import GgufTokenizer

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
"""Changes the settings and the tensors of a file in place."""


def gguf_of(folder: Path, path: Path, change: Change | None = None) -> Path:
    """Write the model of a folder as a GGUF file, changed."""
    write_model(folder, path)
    if change is not None:
        settings, tensors = read_gguf(path)
        change(settings, tensors)
        write_gguf(path, settings, tensors)
    return path


def named_by_llama_cpp(
    model: Any, folder: Path, path: Path, settings: dict[str, Any], *, added_to_norms: float = 0.0
) -> Path:
    """Write a model that only its names and norms distinguish from its file, with the names of the package `gguf`.

    Args:
        folder: Its folder, for the tokenizer.
        settings: Those of the architecture, with `general.architecture`.
        added_to_norms: llama.cpp stores the weights of Gemma's norms plus 1.
    """
    names = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(names[settings["general.architecture"]], model.config.num_hidden_layers)
    tokenizer = GgufTokenizer(folder, vocab_size=model.config.vocab_size).fields(model.config.to_dict())
    tensors = {
        name_map.get_name(name, try_suffixes=(".weight", ".bias")): value.detach().float()
        + (added_to_norms if name.endswith("norm.weight") else 0.0)
        for name, value in model.named_parameters()
    }
    write_gguf(path, settings | tokenizer, tensors)
    return path


def quantized(source: Path, path: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write a file with its matrices in a type of llama.cpp; return the values that they stand for, by GGUF's names."""
    settings, tensors = read_gguf(source)
    stored_as, values = gguf.GGMLQuantizationType[kind], dict[str, torch.Tensor]()

    class Writer(gguf.GGUFWriter):
        """Writes matrices in the type."""

        def add_tensor(self, name: str, tensor: Any, *args: Any, **kwargs: Any) -> None:
            if tensor.ndim > 1:
                blocks = gguf.quantize(tensor, stored_as)
                values[name] = torch.from_numpy(np.array(gguf.dequantize(blocks, stored_as)))
                super().add_tensor(name, blocks, raw_dtype=stored_as)
            else:
                super().add_tensor(name, tensor)

    writer = Writer(path, settings.pop("general.architecture"))
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        adders.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
