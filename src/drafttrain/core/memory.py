"""Returns memory that is not used any more to the system and to other processes."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


def return_memory() -> None:
    """Free what only circles of references hold, then return free memory of the process and its GPUs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        # Of glibc only: other C libraries lack it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
