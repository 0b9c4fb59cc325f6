"""Sizes of weights in memory."""

from __future__ import annotations

from torch import nn


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all parameters of the modules."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
