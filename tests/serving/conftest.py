"""The target of drafters that are served and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from drafttrain.target_model import Target, TargetSettings


@pytest.fixture(scope="module")
def target(save_llama: Callable[..., Path]) -> Target:
    """A tiny target of four layers."""
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))
