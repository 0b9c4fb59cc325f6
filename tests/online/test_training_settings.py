"""A drafter that is loaded to learn online is trained as its recipe says, not by the defaults of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drafttrain.checkpoint import read_drafter
from drafttrain.config.searched import searched_kinds
from drafttrain.core.texts import Record
from drafttrain.drafters import Drafter, drafters
from drafttrain.losses.forward_kl import ForwardKL
from drafttrain.online.learner import Learner
from drafttrain.target_model import Target
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.export import folders

SETTINGS: dict[str, dict[str, Any]] = {
    "causal_lm": {"freeze_embedding": True},
    "sorted_lm": {"freeze_embedding": True},
    "matformer": {"widths": [0.5], "distill": 0.5, "intermediate_size": 64},
    "medusa": {"decay": 0.5},
    "eagle": {"num_steps": 2, "step_decay": 0.5, "feature_weight": 0.5, "loss_weight": 0.3, "feature_noise": 0.1},
    "eagle3": {"num_steps": 2, "step_decay": 0.5},
    "mtp": {"num_steps": 2, "step_decay": 0.3},
    "hidden_transfer": {"train_steps": "together"},
    "chimera": {"step_decay": 0.5},
    "p_eagle": {"depth_ratio": 0.5, "depth_least": 0.3, "train_embedding": True},
    "kangaroo": {},
    "domino": {"gamma": 2.0, "anchors": 3, "base_decay_ratio": 0.5},
    "xpress": {"gamma": 2.0, "anchors": 3, "own_weight": 0.7, "base_weight": 0.2},
    "dspark": {"gamma": 2.0, "anchors": 3},
    "dflash2": {"gamma": 2.0, "anchors": 3, "selector_loss_weight": 0.5},
    "dflash": {"gamma": 2.0, "anchors": 3},
}
KEPT_IN_NO_FOLDER = {"causal_lm", "sorted_lm", "matformer", "medusa"}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=5), byte_tokenizer(), name="tiny", fingerprint="tiny")


def learned(drafter: Drafter, target: Target, **train: Any) -> tuple[set[str], list[float]]:
    """Return which weights are trained, and the losses of two steps."""
    learner = Learner(
        drafter,
        ForwardKL(),
        target=target,
        settings=TrainSettings(batch_size=2, warmup_steps=0, schedule="constant", lr=1e-3, **train),
        max_length=24,
        num_tokens=target.num_tokens,
    )
    records = [Record(str(i), [(7 * i + 3 * k) % 250 for k in range(20)], [False] * 4 + [True] * 16) for i in range(2)]
    losses = [learner.step(records, positions="all").loss for _ in range(2)]
    return {name for name, one in drafter.named_parameters() if one.requires_grad}, losses


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_loaded_drafter_learns_as_the_one_that_was_made(kind: str, target: Target, tmp_path: Path) -> None:
    made = folders.drafter_of(kind, target, **SETTINGS[kind])
    settings = drafters.entry(kind).settings(**folders.SETTINGS[kind] | SETTINGS[kind])
    folder = folders.save(made, tmp_path / "drafter", target)
    loaded, plain = (read_drafter(folder, target, dtype="float32") for _ in range(2))
    loaded.train_with(settings, target=target, tokenizer=target.tokenizer)
    weights, losses = learned(made, target)
    found, same = learned(loaded, target)
    assert found == weights
    assert same == pytest.approx(losses, rel=1e-5)
    without, others = learned(plain, target)
    as_made = without == weights and others == pytest.approx(losses, rel=1e-5)
    assert as_made == (kind not in KEPT_IN_NO_FOLDER), "control: without the settings"


def test_activations_are_recomputed_online(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, counts = [], []
    for recomputed in (False, True):
        drafter, calls = folders.drafter_of("causal_lm", target), list[int]()
        mlp = drafter.language_model.model.layers[0].mlp
        monkeypatch.setattr(mlp, "forward", lambda *read, run=mlp.forward, seen=calls: seen.append(1) or run(*read))
        losses.append(learned(drafter, target, activation_checkpointing=recomputed)[1])
        counts.append(len(calls))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert counts[1] == counts[0] + 2, "once more in the backward pass of each of two steps"


def test_every_kind_that_may_learn_online_is_here() -> None:
    kinds: dict[str, Any] = {name: drafters.entry(name).component for name in drafters.names()}
    tuned = {name for name, kind in kinds.items() if kind.tuned_by.__func__ is not Drafter.tuned_by.__func__}
    assert SETTINGS.keys() == kinds.keys() - (tuned - {"medusa"}) - set(searched_kinds())
