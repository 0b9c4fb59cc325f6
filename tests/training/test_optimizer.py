"""Muon with AdamW, and the schedules."""

import copy
import itertools

import pytest
import torch
from torch import nn

from drafttrain.training.optimizer import MuonAdamW, build_optimizer, learning_rate_scale, orthogonalised
from drafttrain.training.settings import TrainSettings
from drafttrain.training.zero_state import _as_step
from tests.conftest import random_llama


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalised_matrices_keep_directions_and_lose_scale(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64) * 37
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalised(matrix)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    # The same singular vectors: u' X v is diagonal.
    core = u.T @ result @ v.T
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-6
    assert core.diagonal().min() > 0


def test_the_adamw_half_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    a = MuonAdamW([{"params": list(ours.parameters())}], **settings)
    b = torch.optim.AdamW(theirs.parameters(), **settings)
    for _ in range(5):
        x = torch.randn(7, 5)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_muon_takes_hidden_matrices_only_and_its_state_resumes() -> None:
    model = random_llama()
    settings = TrainSettings(optimizer="muon", lr=1e-2)
    optimizer = build_optimizer(model, settings)
    muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    assert names
    assert all("proj" in name for name in names)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    tokens = torch.randint(257, (2, 8))

    def step(net: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        net(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()

    step(model, optimizer)
    other = random_llama(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(other, resumed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedules_begin_warm_peak_and_end_low() -> None:
    for schedule in ("cosine", "wsd"):
        settings = TrainSettings(max_steps=100, warmup_steps=10, schedule=schedule, min_lr_ratio=0.1)
        scale = [learning_rate_scale(step, settings) for step in range(101)]
        assert scale[0] == pytest.approx(1 / 11)
        assert max(scale) == pytest.approx(1.0)
        assert scale[100] == pytest.approx(0.1)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(scale[10:]))
    wsd = TrainSettings(max_steps=100, warmup_steps=10, schedule="wsd", decay_fraction=0.2)
    assert learning_rate_scale(79, wsd) == 1.0
    assert learning_rate_scale(90, wsd) < 0.6
    assert learning_rate_scale(99, TrainSettings(schedule="constant", warmup_steps=0)) == 1.0


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_a_fused_step_that_is_resumed_counts_where_its_parameters_are(fused: bool, device: str) -> None:
    """A fused AdamW on a GPU takes no count from the CPU; a plain one keeps it there, as a new optimizer does."""
    parameter = nn.Parameter(torch.zeros(4, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.defaults["fused"] = fused
    step = _as_step(optimizer, 7, like=parameter)
    assert (step.device.type, step.dtype) == (device, torch.float32)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_muon_in_bf16_mixed_multiplies_in_bfloat16_and_its_update_is_the_same_but_for_rounding(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    updates = {}
    for precision in ("fp32", "bf16-mixed"):
        layer = torch.nn.Linear(*shape, bias=False)
        torch.nn.init.zeros_(layer.weight)
        layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
        build_optimizer(layer, TrainSettings(optimizer="muon", precision=precision)).step()
        updates[precision] = layer.weight.detach()
    exact, rounded = updates["fp32"], updates["bf16-mixed"]
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.05 * exact.norm()
