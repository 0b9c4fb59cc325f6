"""Training steps whose attention is CUDA's flash attention: its operators, on pretended GPUs, with numbers of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from drafttrain.target_model import Target, TargetSettings, packed_forward, packed_kernels
from drafttrain.target_model.documents import reads_packed
from tests.cuda.happenings import Happenings
from tests.cuda.kinds import loss_settings
from tests.cuda.models import new_drafter
from tests.cuda.steps import trained, with_target
from tests.target_model.flash_numbers import flash_numbers

pytestmark = pytest.mark.pretended_cuda


def halves(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    return device.type == "cuda" and dtype is torch.bfloat16


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (packed_kernels, packed_forward):
        monkeypatch.setattr(module, "flash_on_cuda", halves)


def target() -> Target:
    return Target.load(TargetSettings(dtype="bfloat16", device="cuda:0"))


def states_and_gradients(kind: str) -> list[Tensor]:
    """Return the states of a rollout and the gradients of the layer's weights."""
    here = target()
    drafter = new_drafter(kind, here).train()
    batch = with_target(here, drafter)
    with torch.autocast("cuda", torch.bfloat16):
        states = drafter(batch).states_BTD
    torch.stack([state.float().square().mean() for state in states.values()]).sum().backward()
    weights = [p.grad for name, p in drafter.named_parameters() if "proj" in name and p.grad is not None]
    return [found.detach().float().cpu() for found in (*states.values(), *weights)]


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_states_and_gradients_are_those_without_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = states_and_gradients(kind)
    for module in (packed_kernels, packed_forward):
        monkeypatch.setattr(module, "flash_on_cuda", halves)
    with flash_numbers() as calls:
        fused = states_and_gradients(kind)
    # Six blocks of the target, twice where it is tried; each step of the rollout.
    assert len(calls) > 6
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_a_training_goes_through_it_and_does_not_wait_for_it(fused: None, cuda: Happenings, tmp_path: Path) -> None:
    here = target()
    with flash_numbers() as calls:
        assert reads_packed(here.model)
        calls.clear()
        drafter = new_drafter("eagle3", here)
        cuda.clear()
        trained(drafter, here, loss_settings("eagle3"), tmp_path)
    assert len(calls) == 4 * (6 + drafter.own["num_steps"])  # type: ignore[operator]
    report = cuda.report()
    assert "packed_documents.py" not in report, report
    assert "packed_kernels.py" not in report, report
