"""A target that is spread over two processes: each holds its share, and the numbers are those of a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.core.errors import RecipeError
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.anatomy import blocks
from tests.conftest import byte_tokenizer, random_llama
from tests.training.layouts import curve, run, states_digest
from tests.training.test_layouts import CLOSE, Layouts, in_processes

KINDS: dict[str, dict[str, Any]] = {
    "causal_lm": {},
    "medusa": {"num_heads": 2},
    "kangaroo": {},
    "eagle": {"feature_noise": 0.0, "num_steps": 2},
    "eagle3": {"num_steps": 2, "draft_vocab_size": 100},
}
SLACK = 1024
"""Numbers that the libraries may begin to keep meanwhile; one block of the target has nine times as many."""


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target")
    random_llama(num_layers=4).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, target_folder: str) -> Layouts:
    """What two processes trained with the target of a folder, the last one with a whole one."""
    folder = tmp_path_factory.mktemp("sharded")
    layouts: Layouts = [
        (folder / kind, {"kind": kind, "of_kind": of_kind, "stage": 3 if number % 2 == 0 else 1})
        for number, (kind, of_kind) in enumerate(KINDS.items())
    ]
    layouts += [(folder / "logged", {"logged": True, "records_per_device": 2}), (folder / "whole", {"sharded": False})]
    layouts += [(folder / "unlike", {"unlike_rows": True})]
    layouts = [(place, layout | {"target_folder": target_folder}) for place, layout in layouts]
    in_processes(layouts)
    return layouts


@pytest.mark.processes
def test_every_kind_learns_the_same_from_a_target_that_is_spread_out(two: Layouts, tmp_path: Path) -> None:
    for kind, of_kind in KINDS.items():
        alone = run(tmp_path / kind, kind=kind, of_kind=of_kind)
        assert curve(two[0][0].parent / kind) == pytest.approx(alone, **CLOSE), kind
    for name in ("logged", "whole"):
        assert curve(two[0][0].parent / name) == pytest.approx(curve(tmp_path / "causal_lm"), **CLOSE), name


@pytest.mark.processes
def test_processes_whose_rows_are_packed_differently_run_the_target_equally_often(two: Layouts, tmp_path: Path) -> None:
    assert curve(two[0][0].parent / "unlike") == pytest.approx(run(tmp_path, unlike_rows=True), **CLOSE)


@pytest.mark.processes
def test_each_process_holds_its_share_and_weights_and_states_are_those_of_the_whole(
    two: Layouts, target_folder: str
) -> None:
    target = Target.load(TargetSettings(model=target_folder))
    numbers = sum(parameter.numel() for parameter in target.model.parameters())
    in_blocks = sum(parameter.numel() for parameter in blocks(target.model).parameters())
    rotary = sum(buffer.numel() for buffer in target.model.buffers())
    for folder, layout in two:
        for rank in (0, 1):
            census = json.loads((folder / f"target-{rank}.json").read_text())
            assert census["weights"] == target.weights_digest()
            assert census["states"] == states_digest(target)
            share = in_blocks if layout.get("sharded", True) is False else in_blocks / 2
            assert numbers - in_blocks + share <= census["held"] <= numbers - in_blocks + share + 2 * rotary + SLACK, (
                folder
            )


@pytest.mark.parametrize("command", ["fit", "gen"])
def test_one_process_has_nothing_to_spread_a_target_over(command: str, tmp_path: Path) -> None:
    words = [command, "demo", "--runs", str(tmp_path), "train.target_placement=sharded"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == RecipeError.exit_code
    assert "train.target_placement: sharded: one process cannot shard a target" in result.stderr
    assert not any(tmp_path.iterdir())
