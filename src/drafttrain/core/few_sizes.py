"""Few sizes of half-precision products on a CPU: oneDNN compiles code for every new number of rows, and never frees it.

That is about 0.6 MB for each product and number of rows, and more where the heap is fragmented by it. A training step has other
numbers of rows every time.

N = rows, P = rows with padding, D = hidden
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

HALF_TYPES = (torch.bfloat16, torch.float16)


def few_sizes(count: int) -> int:
    """Return the next of few sizes: all up to 32, then 16 in each doubling. At most 1/16 is added, 1/48 on average."""
    step = 1 << max(0, count.bit_length() - 5)
    return -(-count // step) * step


def is_compiled_by_size(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether code is compiled for every size of a product."""
    return device.type == "cpu" and dtype in HALF_TYPES


def in_few_sizes(rows_ND: Tensor) -> Tensor:
    """Return rows_PD for a product: rows of zeros are added where code is compiled for every size."""
    if not is_compiled_by_size(rows_ND.device, rows_ND.dtype):
        return rows_ND
    added = few_sizes(len(rows_ND)) - len(rows_ND)
    return pad(rows_ND, (0, 0, 0, added)) if added else rows_ND
