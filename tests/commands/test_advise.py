"""drafttrain advise: from a drafter folder to its advice, and arguments that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from drafttrain.cli import app
from drafttrain.commands.advise import Question, _opened, advise
from drafttrain.core.errors import RecipeError
from drafttrain.eval.advice import Advice
from drafttrain.eval.typed_json import from_json

SMALL = ["eval.num_prompts=3", "eval.max_new_tokens=8", "eval.temperatures=[0.0]", "eval.replay_lengths=[1, 2]"]


def question(drafter: str, target: str, **changed: object) -> Question:
    asked = {
        "gpus": ["h100"],
        "batches": [1, 64],
        "contexts": [512],
        "dtype": "bfloat16",
        "overrides": [*SMALL, "eval.length.num_draft_tokens=2"],
    }
    return Question(drafter, target, **asked | changed)  # type: ignore[arg-type]


def test_the_advice_of_a_drafter_that_equals_its_target(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = str(save_llama())
    found = advise(question(folder, folder, gpus=["h100", "here"]), out=tmp_path)
    stored = from_json(Advice, json.loads((tmp_path / "advice.json").read_text()))
    assert (stored.surface, stored.ends) == (found.surface, found.ends)
    assert (tmp_path / "advice.png").stat().st_size > 0
    points = {(one.device, one.batch, one.length["num_draft_tokens"]): one for one in found.surface}
    assert {device for device, *_ in points} == {"h100", "h100, ideal", "here"}
    # Equal models: of K + 1 tokens a call none is rejected, and each costs as much as a plain one, so nothing is gained.
    ideal = points["h100, ideal", 1, 1]
    assert ideal.from_replay
    assert not points["h100, ideal", 1, 2].from_replay
    assert ideal.block_efficiency.value == pytest.approx(2, abs=0.3)
    assert ideal.speedup.value == pytest.approx(ideal.block_efficiency.value * ideal.plain_ms / ideal.round_ms)
    assert ideal.speedup.value < 1.05
    # Two calls of the drafter and one of the target.
    decoded = points["h100, ideal", 1, 2]
    assert decoded.round_ms == pytest.approx(3 * decoded.plain_ms, rel=0.1)
    assert points["h100", 64, 1].tokens_per_second > points["h100", 1, 1].tokens_per_second
    assert points["here", 1, 1].round_ms > points["here", 1, 1].plain_ms > 0
    assert any("lone forwards" in line for line in found.measured)
    assert any("70% of its bandwidth" in line for line in found.assumed)


def test_a_pipelined_round_takes_as_long_as_the_slower_device(
    save_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_llama())
    asked = question(folder, folder, batches=[1])
    found = advise(replace(asked, overrides=[*asked.overrides, "eval.schedule=pipelined"]))
    capsys.readouterr()
    assert not any(one.from_replay for one in found.surface), "replay is about serial rounds"
    (ideal,) = (one for one in found.surface if one.device == "h100, ideal")
    # Equal models: two calls of the drafter hide the one of the target.
    assert ideal.round_ms == pytest.approx(2 * ideal.plain_ms, rel=0.1)


def test_rounds_are_those_of_the_evaluation(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    shutil.copytree(save_llama(num_layers=4), folder)
    asked = question(str(folder), str(folder))
    usual = _opened(asked)
    assert (usual.settings.layer_parallel_size, usual.drafter.layer_parallel_size) == (1, 1)
    replace(usual.result, settings={**usual.result.settings, "layer_parallel_size": 2}).write(folder / "eval.json")
    found = _opened(asked)
    assert (found.settings.layer_parallel_size, found.drafter.layer_parallel_size) == (2, 2)


def test_wrong_arguments_are_refused_together(tmp_path: Path) -> None:
    wrong = question("x", "y", gpus=["h100", "h1000"], dtype="int3", bandwidth_share=1.5, peak_share=0.0)
    with pytest.raises(RecipeError) as caught:
        wrong.check()
    for part in ("unknown GPU 'h1000'. Available: b200", "here", "--bandwidth-share", "--peak-share", "got 'int3'"):
        assert part in str(caught.value)
    done = CliRunner().invoke(app, ["advise", "x", "y", "--batch", "0,8", "--context", "2k,many"])
    assert done.exit_code == 2
    for part in ("give one drafter, got 2 names", "--batch: must be whole numbers of 1 or more", "got 'many'"):
        assert part in done.output
