"""The type of a target with dtype auto: it depends on device, size and files, and reads only headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model import number_type as number_type_module
from drafttrain.target_model.number_type import number_type, type_on_gpu
from drafttrain.target_model.product_speed import bfloat16_speedup

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


@pytest.mark.parametrize(("faster", "expected"), [(2.4, "bfloat16"), (1.1, "float32"), (0.4, "float32")])
def test_a_large_target_has_the_faster_type_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], faster: float, expected: str
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        number_type_module, "bfloat16_speedup", lambda width, inner: asked.append((width, inner)) or faster
    )
    folder = write_header(
        tmp_path, {"model.weight": ("F32", [1000, 60_000])}, hidden_size=576, intermediate_size=int(faster * 100)
    )
    assert number_type(TargetSettings(model=str(folder), device="cpu")) == expected
    assert asked == [(576, int(faster * 100))]
    assert f"target in {expected}: bfloat16 products are {faster:.1f} times as fast" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("shape", "config"), [([1000, 40_000], {}), ([1000, 60_000], {"quantization_config": {"quant_method": "gptq"}})]
)
def test_a_small_or_quantized_target_is_not_measured_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: list[int], config: dict[str, Any]
) -> None:
    monkeypatch.setattr(number_type_module, "bfloat16_speedup", lambda *_: pytest.fail("it was measured"))
    folder = write_header(tmp_path, {"model.weight": ("F32", shape)}, **config)
    assert number_type(TargetSettings(model=str(folder), device="cpu")) == "float32"


def test_the_measurement_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    assert bfloat16_speedup(64, 64) > 0
    assert torch.get_num_threads() == before
