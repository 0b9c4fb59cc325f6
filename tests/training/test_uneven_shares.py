"""Processes that read more records of a step than others, or none, train as one process does, under every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.layouts import curve, run
from tests.training.test_layouts import CLOSE, Layouts, in_processes

LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"seven-{stage}": {"stage": stage, "count": 7, "records_per_device": 1} for stage in (0, 1, 2, 3)},
    **{f"two-{stage}": {"stage": stage, "count": 2} for stage in (0, 1, 2, 3)},
    "medusa": {"stage": 2, "count": 2, "kind": "medusa", "of_kind": {"num_heads": 2}},
    "kangaroo": {"stage": 1, "count": 2, "kind": "kangaroo"},
    "eagle": {"stage": 2, "count": 2, "kind": "eagle", "of_kind": {"feature_noise": 0.0, "num_steps": 2}},
    "pieces": {"stage": 3, "count": 7, "kind": "medusa", "of_kind": {"num_heads": 2}, "loss_chunk_rows": 3},
    "eagle3": {"stage": 3, "count": 2, "kind": "eagle3", "of_kind": {"num_steps": 3, "draft_vocab_size": 100}},
}
"""In three processes."""
LIFE: dict[str, Any] = {"count": 7, "stage": 2, "steps": 3}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes trained of steps that they cannot share evenly."""
    folder = tmp_path_factory.mktemp("three")
    layouts: Layouts = [(folder / name, layout) for name, layout in LAYOUTS.items()]
    in_processes([*layouts, (folder / "life", LIFE)], count=3)
    return folder


@pytest.mark.processes
def test_uneven_shares_train_as_one_process_does(three: Path, tmp_path: Path) -> None:
    alone: dict[str, list[float]] = {}
    for name, layout in LAYOUTS.items():
        key = f"{layout.get('kind')} {layout['count']}"
        if key not in alone:
            only = {key: value for key, value in layout.items() if key in ("count", "kind", "of_kind")}
            alone[key] = run(tmp_path / name, **only)
        assert curve(three / name) == pytest.approx(alone[key], **CLOSE), name


@pytest.mark.processes
def test_a_run_continues_on_another_number_of_devices_that_cannot_share_evenly(three: Path, tmp_path: Path) -> None:
    run(three / "life", count=7, steps=6, records_per_device=3)
    in_processes([(three / "life", LIFE | {"steps": 9, "records_per_device": 2, "stage": 1})])
    assert curve(three / "life") == pytest.approx(run(tmp_path, count=7, steps=9), abs=1e-4)
