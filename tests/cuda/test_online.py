"""The online learner on one GPU: steps, its state, and back to it."""

from __future__ import annotations

import pytest
import torch

from drafttrain.losses import losses
from drafttrain.online.learner import Learner
from drafttrain.target_model import Target
from drafttrain.training.settings import TrainSettings
from tests.cuda.kinds import ON_TEXTS
from tests.cuda.models import new_drafter, texts

pytestmark = pytest.mark.pretended_cuda


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ON_TEXTS)
def test_the_learner_steps_and_stands_where_it_stood(name: str, optimizer: str, target: Target) -> None:
    if optimizer == "muon" and name != "causal_lm":
        pytest.skip("one kind will do")
    drafter = new_drafter(name, target)
    settings = TrainSettings(precision="bf16-mixed", optimizer=optimizer)  # type: ignore[arg-type]
    loss = losses.build(losses.entry("ce" if name.startswith("medusa") else "forward_kl").settings()).to("cuda:0")
    learner = Learner(drafter, loss, target=target, settings=settings, max_length=32, num_tokens=target.num_tokens)
    assert not learner.step(texts((14, 11)), positions="all").skipped
    learner.restore(learner.state())
    assert learner.step(texts((14, 11)), positions="all").positions > 0
    assert all(torch.isfinite(p.detach().cpu()).all() for p in drafter.parameters())
