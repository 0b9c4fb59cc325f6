"""The numbers of a training do not depend on where its steps are computed."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from safetensors.torch import load_file

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import DrafttrainError
from drafttrain.distributed.world import without_launcher
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.lora import LoraSettings
from drafttrain.drafters.medusa.settings import JointSettings
from drafttrain.training import strategy
from drafttrain.training.deepspeed_settings import DeepSpeedSettings
from drafttrain.training.optimizer import Share
from tests.marks import slow
from tests.training.layouts import STEPS, curve, run

CLOSE = {"abs": 1e-5}


def in_processes(layouts: list[tuple[Path, dict[str, Any]]], *, count: int = 2) -> None:
    """Train these layouts, one after the other, in several processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    work = json.dumps([[str(folder), layout] for folder, layout in layouts])
    environment = without_launcher(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "-m", "tests.training.layouts", work], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


Layouts = list[tuple[Path, dict[str, Any]]]
# AdamW moves a weight whose first gradient is nothing but rounding by up to the rate. Over many steps TVD++, which is not
# continuous where both probabilities are equal, makes another step of that; forward KL does not.
SMOOTH: dict[str, Any] = {"loss": "forward_kl"}
LIFE = {"stage": 3, "steps": 3} | SMOOTH
MUON_LIFE = LIFE | {"optimizer": "muon"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """What two processes trained, under one launch; the last ones are beginnings of lives under several layouts."""
    folder = tmp_path_factory.mktemp("two")
    layouts: Layouts = [
        (folder / f"{stage}-{optimizer}", {"stage": stage, "records_per_device": at_once, "optimizer": optimizer})
        for stage in (0, 1, 2, 3)
        for at_once, optimizer in ((None, "adamw"), (2, "muon"), (1, "sgd"))
    ]
    full = {"stage": 2, "limits": {5: 150_000}, "on_full_disk": "continue"}
    layouts += [
        (folder / "default", {}),
        (folder / "full", full),
        (folder / "muon-life", MUON_LIFE),
        (folder / "life", LIFE),
    ]
    poisoned = [(folder / f"poisoned-{stage}", {"stage": stage, "as": "poisoned"}) for stage in (0, 2, 3)]
    rarely = {"records_per_device": 2, "log_every_steps": 100, "checkpoint_every_steps": 100}
    census = (folder / "census", {"as": "census"} | rarely)
    # No weight is too small to be spread out.
    spread = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (folder / "spread.json").write_text(json.dumps({"zero_optimization": spread}))
    unlike = (folder / "unlike", {"unlike_rows": True, "deepspeed_file": str(folder / "spread.json")})
    in_processes([*layouts, *poisoned, census, unlike])
    return layouts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The curves of one process without DeepSpeed, by optimizer."""
    return {name: run(tmp_path_factory.mktemp(name), optimizer=name) for name in ("adamw", "sgd", "muon")}


def layouts() -> list[Any]:
    """Return every stage, with and without several micro-batches a step, and every optimizer; most pairs are slow."""
    chosen = {(stage, 2, "adamw") for stage in range(3)} | {(3, None, "adamw"), (3, 2, "muon"), (3, None, "sgd")}
    return [
        pytest.param(*layout, marks=[] if layout in chosen else [pytest.mark.slow])
        for layout in product(range(4), (None, 2), ("adamw", "sgd", "muon"))
    ]


@pytest.mark.parametrize(("stage", "records_per_device", "optimizer"), layouts())
def test_one_process_under_any_stage(
    plain: dict[str, list[float]], tmp_path: Path, stage: int, records_per_device: int | None, optimizer: str
) -> None:
    losses = run(tmp_path, stage=stage, records_per_device=records_per_device, optimizer=optimizer)
    assert losses == pytest.approx(plain[optimizer], **CLOSE)


def test_one_process_listens_on_no_port(tmp_path: Path) -> None:
    """One that was free when it was looked for may be another program's by the time it is listened on."""
    run(tmp_path, stage=2, steps=1)
    store = torch.distributed.distributed_c10d._get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, torch.distributed.HashStore)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "of_kind"),
    [
        slow("medusa", {"num_heads": 2}),
        ("medusa", {"num_heads": 2, "joint": JointSettings(lora=LoraSettings(rank=2, dropout=0.0))}),
        ("kangaroo", {}),
        slow("eagle", {"feature_noise": 0.0, "num_steps": 2}),
        ("eagle3", {"num_steps": 3, "draft_vocab_size": 100}),
    ],
)
def test_every_kind_with_its_weights_spread_out(tmp_path: Path, kind: str, of_kind: dict[str, Any]) -> None:
    # AdamW's first steps have the size of the rate, whatever the gradient: where it is all rounding, they would differ.
    settings: dict[str, Any] = {"kind": kind, "of_kind": of_kind, "optimizer": "sgd"}
    alone = run(tmp_path / "plain", **settings)
    spread = run(tmp_path / "zero", **settings, stage=3, records_per_device=4)
    assert spread == pytest.approx(alone, **CLOSE)


@pytest.mark.parametrize("stage", [None, 3])
def test_activations_computed_again(plain: dict[str, list[float]], tmp_path: Path, stage: int | None) -> None:
    counted: list[str] = []

    class Counting(CausalLMDrafter):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: counted.append("forward"))

    losses = run(tmp_path, stage=stage, drafter=Counting, activation_checkpointing=True)
    assert losses == pytest.approx(plain["adamw"], **CLOSE)
    assert counted.count("forward") >= 2 * len(losses), "each layer ran again in the backward pass"


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        DeepSpeedSettings(stage=2, offload_optimizer="cpu"),
        DeepSpeedSettings(stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
    ],
)
def test_offloaded_to_the_cpu_and_resumed(tmp_path: Path, section: DeepSpeedSettings) -> None:
    run(tmp_path / "offloaded", steps=6, deepspeed=section)
    losses = run(tmp_path / "offloaded", steps=9, deepspeed=section)
    assert losses == pytest.approx(run(tmp_path / "plain", steps=9), **CLOSE)


def test_a_deepspeed_file_takes_the_place_of_the_keys(plain: dict[str, list[float]], tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}))
    section = DeepSpeedSettings(config=str(file))
    assert (section.check(), section.zero_stage) == ([], 1)
    assert run(tmp_path / "run", deepspeed=section) == pytest.approx(plain["adamw"], **CLOSE)


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        ({"train_batch_size": 4}, {}, "train_batch_size: the recipe sets this, in train.batch_size"),
        ({"bf16": {"enabled": True}, "optimizer": {}}, {}, "optimizer: the recipe sets this, in train.optimizer"),
        ({"zero_optimization": {"stage": 7}}, {}, "7 is none of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, {}, "checkpoints would hold others"),
        ({}, {"stage": 3}, "takes the place of stage"),
        (None, {}, "cannot be read"),
    ],
)
def test_a_deepspeed_file_is_checked_against_the_recipe(
    tmp_path: Path, content: Any, settings: dict[str, Any], expected: str
) -> None:
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(json.dumps(content))
    problems = DeepSpeedSettings(config=str(file), **settings).check()
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer: cpu needs stage 1, 2 or 3"),
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters: cpu needs stage 3"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "nvme_path: null"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "x"}, "nvme needs stage 3"),
    ],
)
def test_the_recipe_check_reports_what_a_stage_does_not_allow(settings: dict[str, Any], expected: str) -> None:
    problems = DeepSpeedSettings(**settings).check()
    assert any(expected in problem for problem in problems), problems


def test_the_matrices_that_muon_gathers_are_those_it_was_built_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: one that takes an update for that of its neighbour trains otherwise."""
    alone = run(tmp_path / "plain", optimizer="muon")
    gathered = Share.gathered
    monkeypatch.setattr(Share, "gathered", lambda share, flat: gathered(replace(share, at=0), flat))
    for stage in (2, 3):
        spread = run(tmp_path / f"{stage}", stage=stage, optimizer="muon")
        assert spread != pytest.approx(alone, abs=1e-3)


def test_control_a_mean_of_means_is_another_number(plain: dict[str, list[float]], tmp_path: Path) -> None:
    losses = run(tmp_path, records_per_device=2, mean_of_means=True)
    assert losses != pytest.approx(plain["adamw"], abs=1e-3)


def test_control_dividing_twice_is_another_number(
    plain: dict[str, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategy.ZeroPrecision, "backward", DeepSpeedPrecision.backward)
    losses = run(tmp_path / "sgd", stage=2, records_per_device=2, optimizer="sgd", clip_norm=0.0)
    assert losses != pytest.approx(run(tmp_path / "once", optimizer="sgd", clip_norm=0.0), abs=1e-3)


@pytest.mark.processes
def test_two_processes(plain: dict[str, list[float]], two: Layouts) -> None:
    for folder, layout in two[:-2]:
        assert curve(folder) == pytest.approx(plain[layout.get("optimizer", "adamw")], **CLOSE), folder.name
    kept = {path.name for path in (two[0][0].parent / "full" / "checkpoints").iterdir()}
    assert kept == {"step-00000003.ckpt"}, "the last checkpoint had no room, and both processes went on"
    for stage in (0, 2, 3):
        rows = (two[0][0].parent / f"poisoned-{stage}" / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("skipped_steps")
        skipped = [int(row.split(",")[column]) for row in rows[1:]]
        assert skipped == [0, 0, 1, 1, 2, 2], "what is no number in one process is skipped by both"
    for optimizer in ("adamw", "muon"):
        first, *others = [
            load_file(folder / "last" / "model.safetensors")
            for folder, layout in two[:-2]
            if layout.get("optimizer", "adamw") == optimizer
        ]
        for name, weight in first.items():
            for other in others:
                # Of the whole tensor: a single weight may differ by the rate, as SMOOTH says.
                assert (other[name] - weight).norm() < 1e-3 * weight.norm(), name


@pytest.mark.processes
def test_processes_whose_rows_are_packed_differently_run_a_spread_drafter_equally_often(
    two: Layouts, tmp_path: Path
) -> None:
    """What a model can do is tried by forwards of its own: in all processes, also in one whose rows do not need it."""
    assert curve(two[0][0].parent / "unlike") == pytest.approx(run(tmp_path, unlike_rows=True), **CLOSE)


@pytest.mark.processes
def test_a_step_has_one_sum_of_gradients_and_one_of_the_hosts(two: Layouts) -> None:
    counts = json.loads((two[0][0].parent / "census" / "collectives.json").read_text())
    assert counts[1::2] == counts[::2], "none between two micro-batches"
    assert counts[::2] == [[first + step for first in counts[0]] for step in range(STEPS)]


@pytest.mark.processes
def test_a_run_resumes_under_another_stage_and_world_size(two: Layouts, tmp_path: Path) -> None:
    life, _ = two[-1]
    run(life, stage=1, steps=9, **SMOOTH)
    # The newest one is damaged: both processes go back to the one before.
    (life / "checkpoints" / "step-00000009.ckpt").write_bytes(b"garbage")
    in_processes([(life, {"stage": 2, "steps": 9, "records_per_device": 2} | SMOOTH)])
    assert (life / "checkpoints" / "step-00000009.damaged").exists()
    run(life, steps=12, **SMOOTH)
    run(life, stage=3, steps=15, **SMOOTH)
    assert curve(life) == pytest.approx(run(tmp_path, steps=15, **SMOOTH), abs=1e-4)


@pytest.mark.processes
def test_a_run_with_muon_resumes_under_another_stage_and_world_size(two: Layouts, tmp_path: Path) -> None:
    life, _ = two[-2]
    run(life, stage=1, steps=6, optimizer="muon", **SMOOTH)
    run(life, steps=9, optimizer="muon", **SMOOTH)
    run(life, stage=3, steps=12, optimizer="muon", **SMOOTH)
    assert curve(life) == pytest.approx(run(tmp_path, steps=12, optimizer="muon", **SMOOTH), abs=1e-4)


@pytest.mark.parametrize("stage", [slow(None), 2])
def test_a_run_continues_with_other_micro_batches(tmp_path: Path, stage: int | None) -> None:
    """Three steps of one micro-batch are no multiple of two: a step that ends by their count would end in its middle."""
    for steps, records_per_device in ((3, None), (6, 4), (9, 3)):
        run(tmp_path / "life", stage=stage, steps=steps, records_per_device=records_per_device)
    assert curve(tmp_path / "life") == pytest.approx(run(tmp_path / "whole", steps=9), **CLOSE)


@pytest.mark.parametrize("optimizer", ["adamw", slow("muon")])
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path: Path, optimizer: str) -> None:
    run(tmp_path / "plain", steps=3, optimizer=optimizer)
    run(tmp_path / "zero", stage=3, steps=3, optimizer=optimizer)
    stored = [torch.load(tmp_path / kind / "checkpoints" / "step-00000003.ckpt") for kind in ("plain", "zero")]
    assert stored[0]["state_dict"].keys() == stored[1]["state_dict"].keys()
    assert all(name.startswith(("trained.", "loss.")) for name in stored[0]["state_dict"])
    for plain, zero in zip(*(s["optimizer_states"][0]["state"].values() for s in stored), strict=True):
        assert plain.keys() == zero.keys()
        assert float(plain.pop("step", 3)) == float(zero.pop("step", 3)) == 3
        for key, value in plain.items():
            torch.testing.assert_close(value, zero[key], atol=1e-6, rtol=1e-5)


class Poisoned(CausalLMDrafter):
    """Its states are no numbers at some steps."""

    steps: ClassVar[set[int]]

    def forward(self, batch: DraftBatch) -> DraftOutput:
        drafted = super().forward(batch)
        if batch.step not in self.steps:
            return drafted
        return replace(drafted, states_BTD={depth: x * float("nan") for depth, x in drafted.states_BTD.items()})


class PoisonedLoss(Poisoned):
    """Its loss is no number at some steps, but by a part that has no gradient."""

    def forward(self, batch: DraftBatch) -> DraftOutput:
        drafted = CausalLMDrafter.forward(self, batch)
        wrong = torch.tensor(float("nan" if batch.step == 2 else "inf"))
        return replace(drafted, extra_loss=wrong) if batch.step in self.steps else drafted


@pytest.mark.parametrize(
    ("stage", "poisoned"),
    [
        *((None, Poisoned), slow(0, Poisoned), slow(2, Poisoned), (3, Poisoned)),
        *(slow(None, PoisonedLoss), slow(0, PoisonedLoss), (2, PoisonedLoss), slow(3, PoisonedLoss)),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, stage: int | None, poisoned: type[Poisoned]
) -> None:
    Poisoned.steps = {2, 4}
    losses = run(tmp_path, stage=stage, drafter=poisoned)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    skipped = [int(row[rows[0].index("skipped_steps")]) for row in rows[1:]]
    assert skipped == [0, 0, 1, 1, 2, 2]
    if poisoned is Poisoned:
        assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, False, True]
    Poisoned.steps = {1, 2, 3, 4, 5}
    with pytest.raises(DrafttrainError, match="for the 3rd time in a row"):
        run(tmp_path / "stops", stage=stage, drafter=poisoned, max_skipped_steps=2)


@pytest.mark.parametrize("stage", [None, slow(0), slow(2), 3])
def test_a_skipped_step_changes_no_weight(tmp_path: Path, stage: int | None) -> None:
    Poisoned.steps = {2}
    run(tmp_path / "2", stage=stage, steps=2)
    run(tmp_path / "3", stage=stage, steps=3, drafter=Poisoned)
    before, after = (load_file(tmp_path / str(n) / "last" / "model.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
