"""The benchmark of GPUs without one: what it says then, and a rehearsal of its own code on a CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.config.load import load_recipe

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_of_gpus", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so_and_measures_nothing(script, no_gpu, tmp_path, capsys):
    out = tmp_path / "gpu.md"
    assert script.main(["--out", str(out)]) == 0
    assert "No GPU here" in capsys.readouterr().out
    page = out.read_text()
    assert page == script.not_measured()
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| {name}" for name in script.RECIPES))]
    assert len(rows) == len(script.RECIPES)
    for row in rows:
        assert {cell.strip() for cell in row.split("|")[2:-1]} == {"not measured"}


def test_without_a_gpu_a_table_that_was_measured_stays(script, no_gpu, tmp_path):
    out = tmp_path / "gpu.md"
    out.write_text("# Steps\n\nMeasured over 20 steps.\n")
    assert script.main(["--out", str(out)]) == 0
    assert out.read_text() == "# Steps\n\nMeasured over 20 steps.\n"


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device", "cpu", "--tiny"]])
def test_a_cpu_never_fills_the_table(script, words, capsys):
    with pytest.raises(SystemExit):
        script.main(words)
    assert "rehearse" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["eagle3_llama3.1_8b", "kd_qwen3_8b_0.6b"])
def test_a_rehearsal_goes_through_the_code_of_a_measurement(script, recipe):
    case = script.Case(recipe, device="cpu", tiny=True, warm_steps=1, steps=1)
    found = script.measured(case)
    assert found["micro_batch"] == 2
    assert found["tokens_per_second"] > 0
    assert found["step_tflop"] > 0
    assert found["mfu"] is None
    page = script.table([(case, found), (case, {"failed": "CUDA out of memory"})])
    assert "NOT MEASURED" in page
    assert "failed: CUDA out of memory" in page
    header, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {header.count("|")}
    assert "at least 43%: not measured" in page


def test_every_recipe_is_measured_at_its_own_sizes(script):
    """As its header counts them: nothing is fetched, and nothing is made smaller."""
    for name in script.RECIPES:
        recipe = load_recipe(name)
        named = [recipe.target.model, getattr(recipe.drafter, "checkpoint", None)]
        assert {one for one in named if one} <= set(script.MODELS)
    recipe, meta = load_recipe("eagle3_llama3.1_8b"), torch.device("meta")
    with meta:
        target = script.random_target(recipe, meta)
        drafter = script.random_drafter(recipe, target, meta)
    assert sum(p.numel() for p in target.model.parameters()) == 8_030_261_248
    assert sum(p.numel() for p in drafter.parameters()) == 424_689_664


@pytest.mark.slow
def test_a_case_is_a_process_of_its_own(script, tmp_path):
    """And what goes wrong there is a row of the table."""
    case = script.Case("eagle3_llama3.1_8b", device="cpu", tiny=True, warm_steps=1, steps=1)
    result = tmp_path / "result"
    command = [sys.executable, str(SCRIPT), "--case", json.dumps(asdict(case)), "--result", str(result)]
    subprocess.run(command, check=True)
    assert json.loads(result.with_suffix(".0").read_text())["tokens_per_second"] > 0
    wrong = script.in_processes(script.Case("no_such_recipe", device="cpu", tiny=True))
    assert "no_such_recipe" in wrong["failed"]
