"""The number type that a training computes in, for all that runs beside Lightning's own step: validation, the online learner."""

from __future__ import annotations

import torch

from drafttrain.train.settings import TrainSettings


def training_autocast(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """Return the autocast that `train.precision` asks for on a device; with fp32 it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16-mixed")
