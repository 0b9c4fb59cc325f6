"""The target of exported drafters, and a way to write one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drafttrain.export.convert import read_target_config
from drafttrain.target_model import Target, TargetSettings
from tests.export import folders


@pytest.fixture(scope="module")
def target(save_llama: Callable[..., Path]) -> Target:
    """A tiny target of four layers."""
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


@pytest.fixture(scope="module")
def target_config(target: Target) -> dict[str, Any]:
    """Its configuration."""
    return read_target_config(Path(target.name), name="the/target")


@pytest.fixture
def source(target: Target, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a drafter folder of a kind."""
    return lambda kind, **settings: folders.save(
        folders.drafter_of(kind, target, **settings), tmp_path / "drafter", target
    )
