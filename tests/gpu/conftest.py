"""Tests on real GPUs (`make gpu-check`). Without one they are skipped, and say so.

`DRAFTTRAIN_GPU_TESTS_ON=cpu` rehearses them: the same code with everything on the CPU, which proves nothing of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ON = os.environ.get("DRAFTTRAIN_GPU_TESTS_ON", "cuda")


@pytest.fixture(scope="session")
def device() -> str:
    """The device of the tests: the first GPU."""
    if ON == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
    return f"{ON}:0" if ON == "cuda" else ON


@pytest.fixture(scope="session")
def devices(device: str) -> str:
    """The kind of device, of which there are several."""
    if ON == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device, two are needed")
    return ON


@pytest.fixture(scope="session")
def target_folder(save_llama: Callable[..., Path]) -> Path:
    """A target's folder: as many blocks as the kinds that tap three of them need."""
    return save_llama(num_layers=4)
