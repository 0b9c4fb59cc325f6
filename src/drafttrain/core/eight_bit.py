"""States in eight bits: an integer for each feature and a scale for each group of neighbouring features.

A stored row is one int8 tensor: D integers from -127 to 127, then the bytes of G bfloat16 scales. A row of zeros is a state of zeros.

D = features, G = groups, S = stored bytes
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32
"""Features that share a scale: a few outlier features spoil only their own group (benchmarks/cache.md)."""
LARGEST = 127
SCALE_BYTES = 2


def stored_width(width: int, *, group: int = GROUP) -> int:
    """Return the bytes of a stored row of `width` features."""
    return width + SCALE_BYTES * ceil(width / group)


def in_eight_bits(states: Tensor, *, group: int = GROUP) -> Tensor:
    """Return states (..., D) as int8 rows (..., S). The largest feature of a group is stored as 127 or -127."""
    width = states.shape[-1]
    groups = pad(states.float(), (0, -width % group)).unflatten(-1, (-1, group))
    # bfloat16 has the range of float32: no scale overflows. The integers belong to the rounded scale.
    scales = (groups.abs().amax(dim=-1) / LARGEST).bfloat16()
    steps = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    codes = (groups / steps).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return torch.cat([codes.flatten(-2)[..., :width], scales.contiguous().view(torch.int8)], dim=-1)


def codes_and_steps(stored: Tensor, *, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Return the integers (..., D) of int8 rows, and the size of one step of each, both as float32."""
    width = stored.shape[-1] - SCALE_BYTES * ceil(stored.shape[-1] / (group + SCALE_BYTES))
    scales = stored[..., width:].contiguous().view(torch.bfloat16).float()
    steps = scales[..., None].expand(*scales.shape, group).flatten(-2)
    return stored[..., :width].float(), steps[..., :width]


def from_eight_bits(stored: Tensor, *, group: int = GROUP) -> Tensor:
    """Return int8 rows (..., S) as float32 states (..., D)."""
    codes, steps = codes_and_steps(stored, group=group)
    return codes * steps


def as_states(stored: Tensor) -> Tensor:
    """Return stored states as floating-point numbers; only int8 is changed."""
    return from_eight_bits(stored) if stored.dtype == torch.int8 else stored
