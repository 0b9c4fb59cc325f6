"""The type of a target with dtype auto: it depends on device, size and files, and reads only headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.number_type import type_on_gpu

BILLION = [32_000, 32_000]
BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}


def write_header(folder: Path, tensors: dict[str, tuple[str, list[int]]], **config: Any) -> Path:
    """Write a model folder whose weights file has these shapes and is sparse, without any numbers."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        begin, end = end, end + BYTES[kind] * shape[0] * shape[1]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("BF16", BILLION, "bfloat16"),
        ("F16", BILLION, "float16"),
        ("F32", BILLION, "bfloat16"),
        ("F8_E4M3", BILLION, "bfloat16"),
        ("BF16", [1000, 1000], "float32"),
    ],
)
def test_a_large_target_has_a_16_bit_type_on_a_gpu(tmp_path: Path, kind: str, shape: list[int], expected: str) -> None:
    folder = write_header(tmp_path, {"model.weight": (kind, shape), "model.norm.weight": ("F32", [1, 8])})
    assert type_on_gpu(folder) == expected


def test_a_quantized_target_has_the_16_bit_type_of_its_scales(tmp_path: Path) -> None:
    tensors = {"model.qweight": ("I32", [100, 100]), "model.scales": ("F16", [10, 100])}
    folder = write_header(tmp_path, tensors, quantization_config={"quant_method": "gptq"})
    assert type_on_gpu(folder) == "float16"


def test_stored_is_the_type_of_the_files(tmp_path: Path, tiny_folder: Path) -> None:
    stored = Target.load(TargetSettings(model=str(tiny_folder), dtype="bfloat16"))
    for part in (stored.model, stored.tokenizer):
        part.save_pretrained(tmp_path)
    loaded = {name: Target.load(TargetSettings(model=str(tmp_path), dtype=name)) for name in ("auto", "stored")}
    assert {name: target.model.dtype for name, target in loaded.items()} == {
        "auto": torch.float32,
        "stored": torch.bfloat16,
    }
