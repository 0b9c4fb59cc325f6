"""The type of a target's weights in memory where its settings leave it open: decided by the device, the size and the files."""

from __future__ import annotations

from pathlib import Path

from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import elements_by_type
from drafttrain.target_model.device import kind_of_device
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.settings import TargetSettings

MANY = 1_000_000_000
"""Weights above which a target is held in a half type on a GPU: float32 would take twice the memory at a fraction of the speed."""
HALF_TYPES = {"BF16": "bfloat16", "F16": "float16"}
"""As the headers of safetensors name them, and torch."""


def number_type(settings: TargetSettings) -> str:
    """Return the type that the settings name, and where they say auto what that is here."""
    if settings.dtype != "auto" or settings.model is None:
        return settings.dtype
    if kind_of_device(settings.device) != "cuda":
        return "float32"
    return type_on_gpu(resolve_folder(settings.model, revision=settings.revision))


def type_on_gpu(folder: Path) -> str:
    """Return the type that a target is best held in on a GPU, read off its files without loading them.

    Of more than a billion weights, or of quantized ones: the half type that most of it is stored in, or bfloat16. Else float32.
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
