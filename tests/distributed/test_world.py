"""Which process this is, from the variables of torchrun and Slurm."""

from __future__ import annotations

import pytest

from drafttrain.core.errors import RecipeError
from drafttrain.distributed.world import TORCHRUN, World, world


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World()),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "1",
            },
            World(3, 4, 1, 2),
        ),
        (
            {
                **{"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4(x2)"},
                **{"SLURM_STEP_NODELIST": "gpu[03-05,09]", "SLURM_JOB_ID": "77"},
            },
            World(5, 8, 1, 4),
        ),
    ],
)
def test_the_world_is_read_from_each_launchers_variables(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: World
) -> None:
    for name in [*TORCHRUN, "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world() == expected


def test_incomplete_launcher_variables_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        world()
