"""Where Triton's kernels stand in for PyTorch's operators: on CUDA, where Triton is installed; it comes with PyTorch for CUDA.

N = rows, V = vocabulary
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernel(logits_NV: Tensor) -> bool:
    """Return whether there is a kernel for these rows."""
    return type(logits_NV) is Tensor and logits_NV.is_cuda and logits_NV.dtype in TYPES and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
