"""Where the time of a step goes: every moment belongs to one phase, and no device is waited for between two rows."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.core.peak import PEAK_TFLOPS, peak_of, peak_tflops
from drafttrain.training import step_clock
from drafttrain.training.checkpoints import Checkpoints
from drafttrain.training.metrics_log import COLUMNS, TIMES
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_clock import PENDING, PHASES, StepClock
from tests.drafters.eagle_models import eagle_drafter
from tests.training.test_metrics import rows, target

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


class Time:
    """A clock that stands still until it is moved."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float, before: Any) -> Any:
        """Return a function that does the same and takes so long."""

        def slower(*arguments: Any, **keywords: Any) -> Any:
            result = before(*arguments, **keywords)
            self.now += seconds
            return result

        return slower


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(step_clock, "time", made)
    return made


def test_every_moment_belongs_to_one_phase(clock_time):
    clock = StepClock()
    clock_time.now = 100.0
    clock.begin(CPU)
    for number, phase in enumerate(PHASES * 3):
        clock.enter(phase)
        clock_time.now += number
    size = len(PHASES)
    assert clock.read() == {phase: 3 * number + 3 * size for number, phase in enumerate(PHASES)}
    clock_time.now += 7
    assert clock.read() == dict.fromkeys(PHASES, 0) | {PHASES[-1]: 7}, "what was read is not read again"


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


def test_a_row_explains_its_steps(target, tmp_path, clock_time, monkeypatch):
    """Means over its steps; a checkpoint is in the row after it, and no part of what the utilization is measured by."""
    drafter = eagle_drafter("eagle3", target).float()
    slower = clock_time.passes
    monkeypatch.setattr(target, "read", slower(2, target.read))
    monkeypatch.setattr(drafter, "forward", slower(3, drafter.forward))
    monkeypatch.setattr(torch.optim.SGD, "step", slower(5, torch.optim.SGD.step))
    monkeypatch.setattr(Checkpoints, "save", slower(7, Checkpoints.save))
    before, after = rows(tmp_path, drafter, target, log_every_steps=2, peak_tflops=1e-6, checkpoint_every_steps=2)
    for row, saving in ((before, 0.0), (after, 3500.0)):
        seen = {phase: float(row[f"{phase}_ms"]) for phase in PHASES if phase != "other"}
        assert seen == dict.fromkeys(seen, 0.0) | {
            **{"target": 2000.0, "forward": 3000.0, "optimizer": 5000.0, "checkpoint": saving}
        }
        assert float(row["step_ms"]) == 10000 + saving
        assert float(row["mfu"]) == pytest.approx(int(row["step_flops"]) / (10 * 1e6), rel=1e-3)


def test_the_phases_of_a_step_take_time(target, tmp_path):
    for row in rows(tmp_path, eagle_drafter("eagle3", target).float(), target, log_every_steps=2):
        phases = [float(row[f"{phase}_ms"]) for phase in ("fetch", "target", "forward", "backward", "optimizer")]
        assert min(phases) > 0
        assert sum(phases) <= float(row["step_ms"]) + 0.01


def test_without_a_peak_there_is_no_utilization(target, tmp_path):
    (row,) = rows(tmp_path, eagle_drafter("eagle", target).float(), target, max_steps=1, log_every_steps=1)
    assert row["mfu"] == ""
    assert int(row["step_flops"]) > 0


def test_operations_are_the_same_however_often_rows_are_written(target, tmp_path):
    (once,), every = (
        rows(tmp_path / str(n), eagle_drafter("eagle", target).float(), target, max_steps=3, log_every_steps=n)
        for n in (3, 1)
    )
    assert int(once["step_flops"]) == pytest.approx(sum(int(row["step_flops"]) for row in every) / 3, abs=1)


def test_after_a_checkpoint_that_counted_no_operations_a_row_is_of_the_steps_since(target, tmp_path):
    """As older versions wrote them: neither operations nor the step of the last row."""

    def continued(name: str) -> Any:
        return rows(tmp_path / name, eagle_drafter("eagle", target).float(), target, max_steps=3, log_every_steps=3)

    for name in ("old", "new"):
        drafter = eagle_drafter("eagle", target).float()
        rows(tmp_path / name, drafter, target, max_steps=2, log_every_steps=1, checkpoint_every_steps=2)
    path = tmp_path / "old" / "checkpoints" / "step-00000002.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["flops"]
    (of_log,) = (state for state in checkpoint["callbacks"].values() if "last_row" in state)
    del of_log["last_row"]
    torch.save(checkpoint, path)
    old, new = continued("old"), continued("new")
    assert [row["step"] for row in old] == ["1", "2", "3"]
    assert old[2]["step_flops"] == new[2]["step_flops"]
    assert int(old[2]["step_flops"]) > 0


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
    drafter = eagle_drafter("eagle", target).float()
    rows(tmp_path, drafter, target, max_steps=4, log_every_steps=4, profile_steps=[2, 3])
    (path,) = tmp_path.glob("trace*.json")
    assert path.name == "trace-steps-2-3.json"
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    for phase in ("target", "forward", "backward", "optimizer"):
        assert names.count(f"drafttrain: {phase}") == 2, phase


@pytest.mark.parametrize("steps", [[5], [3, 2], [2, 5], [0, 1]])
def test_steps_to_trace_that_do_not_exist_are_refused(steps, recipe_problems):
    assert "profile_steps" in recipe_problems(f"train.profile_steps={steps}", "train.max_steps=4")


@pytest.mark.parametrize("override", ["train.profile_steps=[1, 2]", "train.peak_tflops=100"])
def test_online_learning_refuses_what_it_would_ignore(override, recipe_problems):
    assert "neither profiled nor timed" in recipe_problems(override, recipe="online")


@pytest.fixture
def recipe_problems() -> Callable[..., str]:
    def problems(*overrides: str, recipe: str = "demo") -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, list(overrides))
        return str(caught.value)

    return problems


def test_what_explains_a_step_may_change_between_two_runs():
    """A run continues when it is asked for a trace."""
    asked = TrainSettings(profile_steps=[1, 2], peak_tflops=3.0)
    assert asked.without_layout() == TrainSettings().without_layout()


def test_rows_of_an_older_run_are_kept(target, tmp_path):
    rows(tmp_path, eagle_drafter("eagle", target).float(), target, max_steps=2, checkpoint_every_steps=2)
    path = tmp_path / "metrics.csv"
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    old = [name for name in table[0] if not name.endswith(("_ms", "_flops", "mfu"))]
    path.write_text("\n".join([",".join(old), *(",".join(row[name] for name in old) for row in table)]) + "\n")
    after = rows(tmp_path, eagle_drafter("eagle", target).float(), target, max_steps=4)
    assert [row["loss"] for row in after][:-1] == [row["loss"] for row in table]
