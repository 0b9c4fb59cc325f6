"""The type of the target's weights in memory. `auto` depends on the device, the size of the model and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafttrain.core.console import say_once
from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.tensors import elements_by_type
from drafttrain.target_model.device import kind_of_device
from drafttrain.target_model.folders import resolve_folder
from drafttrain.target_model.product_speed import TRAINED_ROWS, bfloat16_speedup
from drafttrain.target_model.settings import TargetSettings

MANY = 1_000_000_000
"""Above this many weights a GPU holds the target in 16 bits: float32 would take twice the memory and be much slower."""
MANY_ON_CPU = 50_000_000
"""Above this many weights a CPU holds the target in bfloat16 if its products are faster: smaller ones are fast anyway."""
FASTER = 1.3
"""Products in bfloat16 must be this many times as fast as in float32: less would be noise of the measurement."""
HALF_TYPES = {"BF16": "bfloat16", "F16": "float16"}
"""Names in safetensors headers, and torch's names."""


def number_type(settings: TargetSettings) -> str:
    """Return the type of the settings, with `auto` resolved for this machine.

    On a CPU the result may depend on a measurement: decide it once for all that must agree.
    """
    if settings.dtype != "auto" or settings.model is None:
        return settings.dtype
    if kind_of_device(settings.device) == "cuda":
        return type_on_gpu(resolve_folder(settings.model, revision=settings.revision))
    try:
        return type_on_cpu(resolve_folder(settings.model, revision=settings.revision))
    except CheckpointError:
        return "float32"  # the stage that loads the target reports what is wrong


def type_on_gpu(folder: Path) -> str:
    """Return the type in which a GPU holds a target. Only headers of its files are read.

    Above a billion weights, or if quantized: the 16-bit type of most of its weights, or bfloat16. Else float32.
    """
    elements = elements_by_type(folder)
    if sum(elements.values()) <= MANY and not _quantized(_configuration(folder)):
        return "float32"
    stored = max(
        (kind for kind in elements if kind.startswith(("F", "B"))), key=lambda kind: elements[kind], default=""
    )
    return HALF_TYPES.get(stored, "bfloat16")


def type_on_cpu(folder: Path) -> str:
    """Return the type in which a CPU holds a target: bfloat16 for a large one where this processor is faster in it."""
    config = _configuration(folder)
    if sum(elements_by_type(folder).values()) <= MANY_ON_CPU or _quantized(config):
        return "float32"
    faster = bfloat16_speedup(*_product_sizes(config))
    chosen = "bfloat16" if faster >= FASTER else "float32"
    say_once(
        f"target in {chosen}: bfloat16 products are {faster:.1f} times as fast as float32 ones on this processor; "
        "set target.dtype to choose"
    )
    return chosen


def trains_in_bfloat16(settings: TargetSettings) -> bool:
    """Return whether products of the target's sizes with the many rows of a training step are faster in bfloat16 on this CPU."""
    if settings.model is None:
        return False
    try:
        config = _configuration(resolve_folder(settings.model, revision=settings.revision))
    except CheckpointError:
        return False  # the stage that loads the target reports what is wrong
    faster = bfloat16_speedup(*_product_sizes(config), TRAINED_ROWS)
    chosen = "bf16-mixed" if faster >= FASTER else "fp32"
    say_once(
        f"train.precision: {chosen}: with {TRAINED_ROWS[0]} rows, bfloat16 products are {faster:.1f} times as fast as float32 "
        "ones on this processor; set train.precision to choose"
    )
    return faster >= FASTER


def _product_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Return (hidden size, feed-forward width)."""
    text = config.get("text_config") or config
    width = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 1024)
    return width, int(text.get("intermediate_size") or 4 * width)


def _configuration(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(folder / "config.json")
    return content


def refuse_quantized(model: Any, what: str) -> None:
    """Refuse a model whose weights are not the matrices that its layers multiply with.

    Raises:
        CheckpointError: They are quantized.
    """
    for config in (model.config, model.config.get_text_config()):
        if (given := getattr(config, "quantization_config", None)) is not None:
            held = given if isinstance(given, dict) else given.to_dict()
            method = held.get("quant_method")
            raise CheckpointError(
                f"{what}: the weights are quantized ({getattr(method, 'value', method)}): give the model from before quantization"
            )


def _quantized(config: dict[str, Any]) -> bool:
    return bool((config.get("text_config") or config).get("quantization_config") or config.get("quantization_config"))
