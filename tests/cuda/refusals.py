"""What CUDA refuses and a CPU does not: operands on two devices, a generator of the CPU, matrix products of integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cuda.operands import tensors_in

CPU = torch.device("cpu")

COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
"""Whose two sides may be anywhere."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Whose indices may be on the CPU: they are copied to the device."""

SCALARS_ON_CPU = {"masked_fill", "masked_fill_", "fill", "fill_", "where", "clamp", "clamp_"}
"""Beside all that PyTorch tags as pointwise: one number of the CPU goes to the kernel as an argument."""

PRODUCTS = {"mm", "bmm", "mv", "dot", "addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addbmm", "_grouped_mm"}


def refusal(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    operands: list[Tensor],
    out: torch.device | None,
) -> str:
    """Return what CUDA says to an operation; empty: it runs.

    Args:
        operands: All tensors among the arguments.
        out: The device that its result is on; None: the CPU.
    """
    generator = kwargs.get("generator")
    if generator is not None and out is not None and generator.device.type == "cpu":
        return f"Expected a 'cuda' device type for generator but found 'cpu' (aten::{name})"
    if name in COPIES:
        return ""
    if name in PRODUCTS and not any(one.is_floating_point() or one.is_complex() for one in operands):
        return f'"{name}_cuda" not implemented for {operands[0].dtype}'
    if len({one.device for one in operands}) < 2:
        return ""
    devices = {one.device for one in _bound(func, name, args, kwargs, operands)}
    if len(devices) < 2:
        return ""
    found = " and ".join(sorted(map(str, devices)))
    return f"Expected all tensors to be on the same device, but found at least two devices, {found} (aten::{name})"


def _bound(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
    """Return the operands that must be on one device."""
    if name in INDEXING:
        values = [one for one in args[2:] if isinstance(one, Tensor) and not _number_of_cpu(one)]
        indices = [one for one in tensors_in(args[1]) if one.device != CPU]
        return [args[0], *values, *indices]
    if name.startswith("_fused_"):
        # The learning rate alone may be a number of the CPU.
        return tensors_in([one for one in (*args, *kwargs.values()) if isinstance(one, list | tuple)])
    if (torch.Tag.pointwise in func.tags and not name.startswith("_foreach")) or name in SCALARS_ON_CPU:
        written = args[0] if name.endswith("_") and args else kwargs.get("out")
        return [one for one in tensors if one is written or not _number_of_cpu(one)]
    return tensors


def _number_of_cpu(tensor: Tensor) -> bool:
    return tensor.dim() == 0 and tensor.device == CPU
