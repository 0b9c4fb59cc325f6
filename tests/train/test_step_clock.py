"""Where the time of a step goes: every moment belongs to one phase, and no device is waited for between two rows."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import RecipeError
from drafttrain.train.metrics_log import COLUMNS, TIMES
from drafttrain.train.peak import PEAK_TFLOPS, peak_of, peak_tflops
from drafttrain.train.settings import TrainSettings
from drafttrain.train.step_clock import PENDING, PHASES, StepClock
from tests.drafters.feature_models import feature_drafter
from tests.train.test_metrics import rows, target

__all__ = ["target"]

CPU = torch.device("cpu")


class Event:
    """Stands in for torch.cuda.Event: the device passes it at once, or when it is waited for."""

    made = waited = 0
    behind = False

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.moment, self.passed = time.perf_counter(), not Event.behind

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        Event.waited += 1
        Event.behind, self.passed = False, True

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.moment - self.moment)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    Event.made = Event.waited = 0
    Event.behind = False
    return Event


def test_every_moment_belongs_to_one_phase():
    clock = StepClock()
    began = time.perf_counter()
    clock.begin(CPU)
    for phase in PHASES * 3:
        clock.enter(phase)
        time.sleep(0.0005)
    seconds = clock.read()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - began, abs=1e-3)
    assert all(seconds[phase] >= 0.0015 for phase in PHASES)
    assert sum(clock.read().values()) < 1e-3, "what was read is not read again"


def test_no_device_is_waited_for_before_a_row_is_written(on_device):
    clock = StepClock()
    clock.begin(torch.device("cuda"))
    for phase in PHASES * 200:
        clock.enter(phase)
    assert on_device.waited == 0
    assert on_device.made <= PENDING + 2, "events that the device has passed are used again"
    clock.read()
    assert on_device.waited <= 1


def test_a_device_that_is_behind_is_waited_for_once_a_row(on_device):
    clock = StepClock()
    on_device.behind = True
    clock.begin(torch.device("cuda"))
    for phase in PHASES:
        clock.enter(phase)
    assert on_device.waited == 0
    began = clock._pending[0][1]
    for _, _, event in clock._pending:
        event.passed = True
    seconds = clock.read()
    assert on_device.waited == 1
    assert 0 < sum(seconds.values()) <= time.perf_counter() - began.moment


def test_a_row_explains_its_steps(target, tmp_path):
    """Phases add up to the step; utilization is the operations by the peak that is given, over the time that training took."""
    drafter = feature_drafter("eagle3", target).float()
    table = rows(tmp_path, drafter, target, log_every_steps=2, peak_tflops=0.01, checkpoint_every_steps=2)
    assert [int(row["step"]) for row in table] == [2, 4]
    for row in table:
        phases = {phase: float(row[f"{phase}_ms"]) for phase in PHASES if phase != "other"}
        step, flops = float(row["step_ms"]), int(row["step_flops"])
        assert 0.5 * step < sum(phases.values()) <= step + 0.01
        for phase in ("fetch", "target", "forward", "backward", "optimizer"):
            assert phases[phase] > 0, phase
        training = step - phases["validation"] - phases["checkpoint"]
        assert float(row["mfu"]) == pytest.approx(flops / (training / 1000 * 1e10), rel=1e-2)
    assert float(table[1]["checkpoint_ms"]) > 10 * float(table[0]["checkpoint_ms"]), "in the row after it"


def test_without_a_peak_there_is_no_utilization(target, tmp_path):
    (row,) = rows(tmp_path, feature_drafter("eagle", target).float(), target, max_steps=1, log_every_steps=1)
    assert row["mfu"] == ""
    assert int(row["step_flops"]) > 0


def test_operations_are_the_same_however_often_rows_are_written(target, tmp_path):
    (once,), every = (
        rows(tmp_path / str(n), feature_drafter("eagle", target).float(), target, max_steps=3, log_every_steps=n)
        for n in (3, 1)
    )
    assert int(once["step_flops"]) == pytest.approx(sum(int(row["step_flops"]) for row in every) / 3, abs=1)


def test_columns_that_depend_on_the_machine_are_named():
    assert set(COLUMNS) - set(TIMES) == {
        *("step", "loss", "acceptance_rate", "one_minus_acceptance_rate", "lr", "grad_norm", "skipped_steps", "tokens"),
        "step_flops",
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A100 80GB PCIe", 311.9),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H1000", None),
        ("Radeon", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name, peak):
    assert peak_tflops(name) == peak


def test_every_peak_is_found_by_its_own_name():
    assert {key: peak_tflops(f"NVIDIA {key.upper()}") for key in PEAK_TFLOPS} == PEAK_TFLOPS
    assert peak_of(CPU, None) is None
    assert peak_of(CPU, 2.5) == 2.5


def test_a_trace_has_the_steps_that_were_asked_for(target, tmp_path):
    drafter = feature_drafter("eagle", target).float()
    rows(tmp_path, drafter, target, max_steps=4, log_every_steps=4, profile_steps=[2, 3])
    (path,) = tmp_path.glob("trace*.json")
    assert path.name == "trace-steps-2-3.json"
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    for phase in ("target", "forward", "backward", "optimizer"):
        assert names.count(f"drafttrain: {phase}") == 2, phase


@pytest.mark.parametrize("steps", [[5], [3, 2], [2, 5], [0, 1]])
def test_steps_to_trace_that_do_not_exist_are_refused(steps, recipe_problems):
    assert "profile_steps" in recipe_problems(f"train.profile_steps={steps}", "train.max_steps=4")


@pytest.fixture
def recipe_problems() -> object:
    from drafttrain.config.load import load_recipe

    def problems(*overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path("recipes/demo.yaml"), list(overrides))
        return str(caught.value)

    return problems


def test_what_explains_a_step_may_change_between_two_runs():
    """A run goes on when it is asked for a trace."""
    asked = TrainSettings(profile_steps=[1, 2], peak_tflops=3.0)
    assert asked.without_layout() == TrainSettings().without_layout()


def test_rows_of_an_older_run_are_kept(target, tmp_path):
    rows(tmp_path, feature_drafter("eagle", target).float(), target, max_steps=2, checkpoint_every_steps=2)
    path = tmp_path / "metrics.csv"
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    old = [name for name in table[0] if not name.endswith(("_ms", "_flops", "mfu"))]
    path.write_text("\n".join([",".join(old), *(",".join(row[name] for name in old) for row in table)]) + "\n")
    after = rows(tmp_path, feature_drafter("eagle", target).float(), target, max_steps=4)
    assert [row["loss"] for row in after][:-1] == [row["loss"] for row in table]
