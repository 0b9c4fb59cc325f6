"""One real GPU: the losses of a CPU, a stop and a resume, bf16, and decoding that emits what the target alone emits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.core.errors import Interrupted
from drafttrain.core.texts import Sampling
from drafttrain.eval.acceptance.lossless import LosslessSettings
from drafttrain.eval.length.fixed import FixedLengthSettings
from drafttrain.eval.length.tree import TreeSettings
from drafttrain.eval.proposers.none import NoDraft
from drafttrain.pipeline.data import write_texts as write_data
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.evaluating import evaluate_folders
from drafttrain.target_model import Target, TargetSettings
from tests.cuda.kinds import KINDS
from tests.cuda.models import PROMPTS, engine, new_drafter
from tests.cuda.test_recipes import stop_in_step
from tests.gpu.runs import FP32, losses, recipe_on, rows, trained

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", KINDS)
def test_steps_of_every_kind_have_the_losses_of_a_cpu(
    name: str, device: str, target_folder: Path, tmp_path: Path
) -> None:
    """In float32 without TF32: kernels add up in another order, and nothing else differs."""
    curves = [
        losses(trained(recipe_on(on, name, target=target_folder, folder=tmp_path, **FP32), tmp_path / f"on-{number}"))
        for number, on in enumerate(("cpu", device))
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[0][-1] != curves[0][0]


@pytest.mark.parametrize("name", KINDS)
def test_bf16_mixed_stays_near_float32(name: str, device: str, target_folder: Path, tmp_path: Path) -> None:
    mixed = FP32 | {"precision": "bf16-mixed"}
    full, half = (
        losses(trained(recipe_on(device, name, target=target_folder, folder=tmp_path, **settings), tmp_path / key))
        for key, settings in (("fp32", FP32), ("bf16", mixed))
    )
    assert half == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    name: str, device: str, target_folder: Path, tmp_path: Path
) -> None:
    """A whole recipe, bf16-mixed on a bf16 target: stopped after a step, continued, validated, exported, evaluated."""
    made = recipe_on(device, name, target=target_folder, folder=tmp_path, dtype="bfloat16")
    whole = losses(trained(made, tmp_path / "whole"))
    run = DrafterRun(made, tmp_path / "stopped")
    write_data(run)
    assert run.target.device == next(run.drafter.parameters()).device == torch.device(device)
    stop_in_step(run, 0)
    with pytest.raises(Interrupted):
        run.train()
    run = DrafterRun(made, tmp_path / "stopped")
    run.train()
    # Gradients are added up by atomic operations, in any order.
    assert losses(rows(tmp_path / "stopped")) == pytest.approx(whole, rel=1e-2)
    run.export_best()
    folders = {"drafter": run.folder.drafter, "start": run.folder.start}
    result = evaluate_folders(folders, run.target, made.eval, dropped=[])
    assert result.temperatures[0].drafters["drafter"].block_efficiency.value >= 1


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("name", KINDS)
def test_decoding_emits_what_the_target_alone_emits(name: str, tree: bool, device: str, target_folder: Path) -> None:
    """In float64, where no two tokens are as likely as each other to within what the order of a sum changes."""
    if tree and name == "kangaroo":
        pytest.skip("kangaroo drafts chains")
    target = Target.load(TargetSettings(model=str(target_folder), device=device, dtype="float64"))
    drafter: Any = new_drafter(name, target, device=device).double().eval()
    if name.startswith("medusa"):
        drafter.paths = [(0,), (1,), (0, 0)]
    length = TreeSettings(num_draft_tokens=6, depth=2, width=2) if tree else FixedLengthSettings(3)
    greedy = {"rule": LosslessSettings(), "sampling": Sampling(), "max_new_tokens": 24}
    texts = [
        [one.tokens for one in engine(target, proposer, length=settings, **greedy).generate(PROMPTS)]
        for proposer, settings in ((NoDraft(), FixedLengthSettings(1)), (drafter.proposer(target), length))
    ]
    assert texts[0] == texts[1]


def test_a_row_has_the_times_of_the_device(device: str, target_folder: Path, tmp_path: Path) -> None:
    """And a utilization, by the peak that is given."""
    made = recipe_on(device, "eagle3", target=target_folder, folder=tmp_path, **FP32)
    made = replace(made, train=replace(made.train, peak_tflops=100.0, profile_steps=[2, 3]))
    table = trained(made, tmp_path / "run")
    for row in table:
        phases = [float(row[f"{phase}_ms"]) for phase in ("target", "forward", "backward", "optimizer")]
        assert all(phase > 0 for phase in phases)
        assert sum(phases) < float(row["step_ms"])
        assert 0 <= float(row["mfu"]) < 1
    assert (tmp_path / "run" / "trace-steps-2-3.json").stat().st_size > 0


@pytest.mark.parametrize("name", ["causal_lm", "medusa", "kangaroo", "eagle", "eagle3_cut"])
def test_compiled_steps_have_the_losses_of_others(name: str, device: str, target_folder: Path, tmp_path: Path) -> None:
    plain, fast = (
        losses(trained(recipe_on(device, name, target=target_folder, folder=tmp_path, **settings), tmp_path / key))
        for key, settings in (("plain", FP32), ("compiled", FP32 | {"compile": True}))
    )
    assert fast == pytest.approx(plain, rel=1e-4)
