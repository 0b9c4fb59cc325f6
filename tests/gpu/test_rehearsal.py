"""The code of the tests on GPUs where there is none: a slip in it would only be seen by who has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.kinds import KINDS
from tests.gpu.runs import FP32, losses, recipe_on, trained


@pytest.mark.parametrize("name", KINDS)
def test_the_recipe_of_every_kind_can_be_made(name: str, target_folder: Path, tmp_path: Path) -> None:
    made = recipe_on("cpu", name, target=target_folder, folder=tmp_path, **FP32)
    assert (made.target.device, made.train.precision, made.train.max_steps) == ("cpu", "fp32", 4)


def test_a_kind_trains(target_folder: Path, tmp_path: Path) -> None:
    curve = losses(trained(recipe_on("cpu", "medusa", target=target_folder, folder=tmp_path, **FP32), tmp_path / "run"))
    assert len(curve) == 4
    assert curve[-1] != curve[0]
