"""drafttrain calibrate: what it prints and writes, that an evaluation reads it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drafttrain.core.errors import CheckpointError
from drafttrain.core.recalibration import FITS, read_map
from tests.cli.test_cli import call

SMALL = ("eval.num_prompts=4", "eval.max_new_tokens=32", "eval.prompt_tokens=16")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("calibrated") / "out" / "c.json"
    out, _ = call(
        *("calibrate", "builtin:drafter", "--temperature", "0", *SMALL),
        *("--out", str(path)),
    )
    return path, out


def test_figures_are_of_prompts_that_no_map_was_fitted_on(calibrated: tuple[Path, str]) -> None:
    path, out = calibrated
    held = json.loads(path.read_text())
    assert held["confidence"] == "largest probability"
    assert held["fitted_on"]["prompts"] == 2
    assert set(held["held_out"]) == {"as it is", *FITS}
    counts = {one["count"] for one in held["held_out"].values()}
    assert len(counts) == 1
    assert f"{counts.pop()} draft tokens of 2 prompts that no map was fitted on" in out
    assert "isotonic (written)" in out
    chance = read_map(held["map"])
    assert 0 <= chance(0.1) <= chance(0.9) <= 1


@pytest.mark.long
def test_an_evaluation_reads_the_file_and_other_models_are_refused(
    calibrated: tuple[Path, str], tmp_path: Path
) -> None:
    path, _ = calibrated
    length = f"eval.length={{kind: confidence, threshold: 0.5, calibration: {path}}}"
    run = ("eval", "builtin:drafter", "--target", "builtin:target", length, "eval.temperatures=[0]", *SMALL[:1])
    rest = ("eval.max_new_tokens=16", "eval.speed_prompts=0", "eval.replay_lengths=[1]", "--out", str(tmp_path))
    call(*run, *rest)
    result = json.loads((tmp_path / "eval.json").read_text())
    (part,) = result["temperatures"]
    assert part["drafters"]["drafter"]["length"]["calibration"] == str(path)
    assert part["drafters"]["drafter"]["parity"]["num_unexplained"] == 0
    held = json.loads(path.read_text())
    other = tmp_path / "other.json"
    held["made_for"]["target_fingerprint"] = "0"
    other.write_text(json.dumps(held))
    _, error = call(*(word.replace(str(path), str(other)) for word in run), *rest, code=CheckpointError.exit_code)
    assert "was fitted for the target" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval.length={kind: fixed}",), "fixed decides by no confidence: choose one of"),
        (("eval.length={kind: confidence, calibration: x.json}",), "eval.length.calibration: the confidence is"),
        (("--method", "mean"), "--method: must be one of isotonic, temperature, platt"),
        (("--temperature", "-1"), "--temperature: a number of 0 or more"),
        (("another",), "give one drafter, got 2 names"),
    ],
)
def test_wrong_arguments_are_named(words: tuple[str, ...], message: str) -> None:
    _, error = call("calibrate", "builtin:drafter", "--target", "builtin:target", *words, code=2)
    assert message in " ".join(error.split())


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    words = (
        "calibrate",
        "builtin:drafter",
        "--target",
        "builtin:target",
        "eval.num_prompts=2",
        "eval.max_new_tokens=4",
    )
    _, error = call(*words, "--out", str(tmp_path / "c.json"), code=1)
    assert "draft tokens of 1 prompts were tested, at least 50 are needed" in " ".join(error.split())
    assert not (tmp_path / "c.json").exists()
