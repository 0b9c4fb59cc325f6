"""The type of the target's weights in memory. `auto` depends on the device, the size of the model and its files."""

from __future__ import annotations

from pathlib import Path

from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import elements_by_type
from drafttrain.target_model.device import kind_of_device
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.settings import TargetSettings

MANY = 1_000_000_000
"""Above this many weights a GPU holds the target in 16 bits: float32 would take twice the memory and be much slower."""
HALF_TYPES = {"BF16": "bfloat16", "F16": "float16"}
"""Names in safetensors headers, and torch's names."""


def number_type(settings: TargetSettings) -> str:
    """Return the type of the settings, with `auto` resolved for this machine."""
    if settings.dtype != "auto" or settings.model is None:
        return settings.dtype
    if kind_of_device(settings.device) != "cuda":
        return "float32"
    return type_on_gpu(resolve_folder(settings.model, revision=settings.revision))


def type_on_gpu(folder: Path) -> str:
    """Return the type in which a GPU holds a target. Only headers of its files are read.

    Above a billion weights, or if quantized: the 16-bit type of most of its weights, or bfloat16. Else float32.
    """
    elements = elements_by_type(folder)
    config = read_json(folder / "config.json")
    quantized = (config.get("text_config") or config).get("quantization_config") or config.get("quantization_config")
    if sum(elements.values()) <= MANY and not quantized:
        return "float32"
    stored = max(
        (kind for kind in elements if kind.startswith(("F", "B"))), key=lambda kind: elements[kind], default=""
    )
    return HALF_TYPES.get(stored, "bfloat16")
