"""fit-scaling: points of run folders and tables, the figures that it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from drafttrain.commands.fit_scaling import fit_runs
from drafttrain.core.errors import DataError
from drafttrain.eval.result import LOSSY, read_result
from drafttrain.eval.scaling import fit
from drafttrain.pipeline.scaling_runs import read_points
from tests.cli.test_cli import call
from tests.commands.test_sweep import Finisher, counts, swept


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "DRAWS", 10)


SIZES, TOKENS = (1e5, 3e5, 1e6, 3e6), (1e6, 4e6, 1.6e7, 6.4e7)


def write_table(path: Path, **changed: object) -> Path:
    """Write a table of 16 runs that are exactly log-linear."""
    rows = [
        {
            "parameters": size,
            "tokens": tokens,
            "block_efficiency": -1.0 + 0.2 * math.log10(size) + 0.35 * math.log10(tokens),
            "num_draft_tokens": 7,
            "mbsu": (-1.0 + 0.2 * math.log10(size) + 0.35 * math.log10(tokens)) / (1 + size / 1e7),
        }
        for size in SIZES
        for tokens in TOKENS
    ]
    rows[3] |= changed
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_is_fitted_predicted_and_planned(tmp_path):
    table = write_table(tmp_path / "runs.csv")
    arguments = [
        "fit-scaling",
        str(table),
        "--at",
        "tokens=1e8,parameters=1e6",
        "--budget",
        "6e13",
        "--out",
        str(tmp_path),
    ]
    out, err = call(*arguments)
    assert "log-linear" in out
    assert f"block efficiency at tokens 1e+08, parameters 1e+06: {-1 + 1.2 + 2.8:.3f}" in err
    found = json.loads((tmp_path / "scaling.json").read_text())
    best = found["scaling"]["forms"][0]
    assert best["name"] == "log-linear"
    assert best["coefficients"]["slope of log10 tokens"] == pytest.approx(0.35)
    assert found["plan"]["parameters"] * found["plan"]["tokens"] * 6 == pytest.approx(6e13)
    assert (tmp_path / "scaling.png").stat().st_size > 5000


def test_runs_of_a_sweep_are_points_at_their_exported_step(tmp_path):
    swept(tmp_path, Finisher())
    points = read_points([tmp_path])
    assert len(points) == 8
    one = next(point for point in points if "lr-3e-3_loss-tvd_seed-1" in point.source)
    prompts = counts(1, 3)
    assert one.block_efficiency == sum(p.num_tokens for p in prompts) / sum(p.num_rounds for p in prompts)
    assert (one.tokens, one.seed, one.num_draft_tokens) == (500, 1, 1)
    assert read_points([Path(one.source)]) == [one]
    assert read_points([tmp_path, Path(one.source)]) == points, "a run beside its sweep counts once"
    moved = read_result(Path(one.source) / "eval.json")
    replace(moved, target=replace(moved.target, fingerprint="another")).write(Path(one.source) / "eval.json")
    with pytest.raises(DataError, match="2 different targets"):
        read_points([tmp_path])
    replace(moved, exactness=LOSSY).write(Path(one.source) / "eval.json")
    with pytest.raises(DataError, match=r"seed-1: eval\.rule is lossy"):
        read_points([tmp_path])
    moved.write(Path(one.source) / "eval.json")
    with pytest.raises(DataError, match="there is nothing to fit"):
        fit_runs([tmp_path], out=tmp_path / "out")


def test_what_cannot_be_read_is_named_all_at_once(tmp_path):
    table = write_table(tmp_path / "runs.csv", tokens="many", parameters=0)
    other = write_table(tmp_path / "other.csv", num_draft_tokens=3)
    (tmp_path / "empty").mkdir()
    high = write_table(tmp_path / "high.csv", block_efficiency=9)
    (tmp_path / "latin.csv").write_bytes("parameters,tok\xe9ns".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_points([table, other, high, tmp_path / "latin.csv", tmp_path / "empty", tmp_path / "missing.csv"])
    message = str(caught.value)
    assert "runs.csv:5: tokens must be a number above 0, got 'many'" in message
    assert "runs with 3, 7 draft tokens" in message
    assert "empty: no eval.json" in message
    assert "high.csv:5: block_efficiency must be in 1..num_draft_tokens + 1, got 9" in message
    assert "latin.csv: 'utf-8' codec" in message
    assert "missing.csv" in message


def test_questions_that_the_runs_do_not_answer_are_refused(tmp_path):
    table = write_table(tmp_path / "runs.csv")
    for option, value, reason in [
        ("--at", "tokens=1e40,parameters=1e6", "between 1 and 8"),
        ("--at", "tokens=1e8", "the runs vary in tokens and parameters"),
        ("--budget", "1", "Give a budget between these"),
    ]:
        _, err = call("fit-scaling", str(table), option, value, "--out", str(tmp_path), code=1)
        assert reason in err
    for option, value in [
        ("--at", "size=3"),
        ("--at", "tokens=-1"),
        ("--at", "tokens=1e8,tokens=2e8"),
        ("--budget", "-1"),
    ]:
        _, err = call("fit-scaling", str(table), option, value, code=2)
        assert option in err
