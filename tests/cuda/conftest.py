"""Every test here has two pretended GPUs, and fails where CUDA would have refused something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from drafttrain.drafters import Drafter
from drafttrain.target_model import Target, TargetSettings
from tests.cuda import preload
from tests.cuda.happenings import Happenings, happenings
from tests.cuda.models import decoding_drafter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all where CUDA cannot be pretended."""
    from tests.cuda import plugin

    if preload.loaded_guard is None:
        for item in items:
            if item.path.parent == preload.SOURCE.parent:
                item.add_marker(pytest.mark.skip(reason=plugin.reason))


@pytest.fixture(scope="session")
def _gpus() -> Iterator[None]:
    from tests.cuda.runtime import gpus

    with gpus(2):
        yield


@pytest.fixture(autouse=True)
def cuda(request: pytest.FixtureRequest, _gpus: None) -> Iterator[Happenings]:
    """What happened on the devices in this test."""
    happenings.clear()
    yield happenings
    happenings.require_no_refusal()


@pytest.fixture(scope="session")
def target_folder(save_llama: Callable[..., Path], _gpus: None) -> Path:
    """A target's folder: as many blocks as the kinds that tap three of them need."""
    return save_llama(num_layers=4)


@pytest.fixture(scope="session")
def target(target_folder: Path) -> Target:
    """The target, in bfloat16 on the first GPU."""
    return Target.load(TargetSettings(model=str(target_folder), device="cuda:0", dtype="bfloat16"))


@pytest.fixture(scope="session")
def drafter_of(target: Target) -> Callable[[str], Drafter]:
    """A function that returns a kind's drafter as it decodes, made once."""
    return cache(lambda name: decoding_drafter(name, target))
