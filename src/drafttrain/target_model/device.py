"""The device that a setting names."""

from __future__ import annotations

import torch

from drafttrain.core.errors import DrafttrainError


def pick_device(name: str) -> torch.device:
    """Return the device of a setting; auto is cuda if available.

    Raises:
        DrafttrainError: There is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DrafttrainError(f"device {name!r}: must be cpu, cuda, cuda:1 ..., or auto") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        there = ", ".join(f"cuda:{number}" for number in range(count)) or "none"
        raise DrafttrainError(
            f"device {name}: no such CUDA device. Available: {there}. Choose one of them, cpu or auto"
        )
    return device


def kind_of_device(name: str) -> str:
    """Return the kind of device of a setting, cuda or cpu, even if this machine lacks it; auto is cuda if available."""
    return pick_device("auto").type if name == "auto" else name.partition(":")[0]
