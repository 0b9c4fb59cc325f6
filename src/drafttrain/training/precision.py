"""The number types that a training computes in: its autocast, and what float32 means on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from drafttrain.target_model import Target
from drafttrain.training.settings import TrainSettings

SLOWER_THAN_TF32, SLOWER_THAN_BFLOAT16 = 7, 15
"""How many times longer a float32 product takes without TF32, by the peak rates of an H100: 67, 495 and 989 TFLOP/s."""


def training_autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """Return the autocast that `train.precision` asks for on a device; with fp32 it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16-mixed")


@contextmanager
def float32_products(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices inside the block as set by `train.tf32`; has an effect only on CUDA."""
    if device.type != "cuda":
        yield
        return
    # Lightning reads these names too; torch refuses to mix them with `fp32_precision`.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32 is not False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def note_on_float32(settings: TrainSettings, device: torch.device, target: Target | None) -> str | None:
    """Return a note on float32 on a GPU; None: nothing is multiplied in float32."""
    chosen = {"train.precision: fp32": settings.precision == "fp32"}
    chosen["target.dtype: float32"] = target is not None and target.model.dtype == torch.float32
    keys: Sequence[str] = [key for key, there in chosen.items() if there]
    if device.type != "cuda" or not keys:
        return None
    if settings.tf32 is not False:
        return f"{', '.join(keys)}: matrices are multiplied in TF32 (train.tf32)"
    return (
        f"{', '.join(keys)} without TF32: products of matrices take about {SLOWER_THAN_TF32} times as long as in TF32 "
        f"(train.tf32: true), and {SLOWER_THAN_BFLOAT16} times as long as in bfloat16 (peak rates of an H100)"
    )
