"""Peak operations per second of a device, against which a training's utilization (MFU) is measured."""

from __future__ import annotations

import torch

PEAK_TFLOPS = {
    "gb300": 2500.0,
    "gb200": 2500.0,
    "b300": 2250.0,
    "b200": 2250.0,
    "b100": 1750.0,
    "h200 nvl": 835.5,
    "h200": 989.4,
    "gh200": 989.4,
    "h100 nvl": 835.5,
    "h100 pcie": 756.0,
    "h100": 989.4,
    "h800 pcie": 756.0,
    "h800": 989.4,
    "h20": 148.0,
    "a100": 311.9,
    "a800": 311.9,
    "a40": 149.7,
    "a30": 165.0,
    "a10g": 70.0,
    "a10": 125.0,
    "l40s": 362.0,
    "l40": 181.0,
    "l20": 119.5,
    "l4": 121.0,
    "rtx 6000 ada": 364.2,
    "rtx a6000": 154.8,
    "rtx a5000": 111.1,
    "rtx 5090": 209.5,
    "rtx 4090": 165.2,
    "rtx 3090": 71.2,
    "v100-sxm": 125.0,
    "v100-pcie": 112.0,
    "t4": 65.1,
    "mi325x": 1307.4,
    "mi300x": 1307.4,
    "mi250x": 383.0,
    "mi210": 181.0,
}
"""Dense products of 16-bit numbers summed up in 32 bits, in TFLOP/s, by the words of a device's name. From the makers' data
sheets, without sparsity: theirs often double the figure for it."""


NOT_WHOLE = {"laptop", "mig", "max"}
"""Name parts of devices that are slower than the full device: a slice of it (MIG), or with less power."""


def peak_tflops(name: str) -> float | None:
    """Return the peak of a device by name; None: it is not in the table."""
    words = set(name.lower().replace("-", " ").split())
    words |= {word.rstrip("0123456789") for word in words if word.startswith("sxm")}
    if words & NOT_WHOLE:
        return None
    known = {frozenset(key.replace("-", " ").split()): peak for key, peak in PEAK_TFLOPS.items()}
    fitting = [key for key in known if key <= words]
    return known[max(fitting, key=len)] if fitting else None


def peak_of(device: torch.device, given: float | None) -> float | None:
    """Return the peak in TFLOP/s: the one that is given, or that of the device's name; None: not known."""
    if given is not None or device.type != "cuda" or not torch.backends.cuda.is_built():
        return given
    return peak_tflops(torch.cuda.get_device_name(device))
