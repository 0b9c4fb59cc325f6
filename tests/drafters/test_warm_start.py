"""A drafter that starts from a folder equals the one in it, keeps its vocabulary, and continues training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.checkpoint import About, write_about
from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Prompt
from drafttrain.drafters import drafters
from drafttrain.target_model import Target, TargetSettings
from tests.export import folders
from tests.export.trained import learn

KINDS = ("medusa", "eagle", "eagle3", "mtp", "chimera")


@pytest.fixture(scope="module")
def target(save_llama) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


@pytest.fixture
def folder(target, tmp_path):
    """A function that writes a drafter folder of a kind."""
    return lambda kind: folders.save(folders.drafter_of(kind, target), tmp_path / "first", target)


def started(kind: str, target: Target, checkpoint: Path, **settings: Any) -> Any:
    entry: Any = drafters.entry(kind)
    given = entry.settings(checkpoint=str(checkpoint), **settings)
    assert not given.check()
    return entry.component.create(given, target=target, tokenizer=target.tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_drafter_of_the_folder_and_continues_training(kind, folder, target, tmp_path):
    torch.manual_seed(99)
    source = folder(kind)
    drafter = started(kind, target, source)
    drafter.fit_vocabulary(lambda: torch.arange(target.vocab_size))
    assert drafter.training
    folders.save(drafter, tmp_path / "again", target)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    learn(drafter, target, [Prompt("a", [5, 6, 7])], steps=2, new_tokens=8, lr=1e-3)
    now = drafter.state_dict()
    matrices = [name for name in before if before[name].is_floating_point()]
    assert all(not torch.equal(now[name], before[name]) for name in matrices)


def test_training_settings_come_from_the_recipe(folder, target, tmp_path):
    drafter = started("eagle3", target, folder("eagle3"), num_steps=2, draft="greedy")
    assert (drafter.own["num_steps"], drafter.draft, drafter.config["drafttrain"]["draft"]) == (2, "greedy", "greedy")
    assert started("medusa", target, save_medusa(target, tmp_path), decay=0.5).decay == 0.5


def save_medusa(target: Target, tmp_path: Path) -> Path:
    return folders.save(folders.drafter_of("medusa", target), tmp_path / "medusa", target)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [("medusa", "num_heads", 2), ("eagle", "intermediate_size", 8), ("eagle3", "taps", [0, 1, 2])],
)
def test_a_setting_that_the_checkpoint_fixes_is_refused(kind, setting, value):
    settings: Any = drafters.entry(kind).settings
    (problem,) = settings(checkpoint="folder", **{setting: value}).check()
    assert problem == f"{setting}: the checkpoint fixes it: leave it out"
    assert not settings(**{setting: value}).check()


def test_a_folder_of_another_kind_or_project_is_refused(folder, target, tmp_path):
    source = folder("eagle")
    with pytest.raises(CheckpointError, match=r"has kind eagle, drafter\.kind is eagle3"):
        started("eagle3", target, source)
    (source / "drafttrain.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"not a drafter folder: .*drafttrain\.json: no such file.* drafttrain import"
    ):
        started("eagle", target, source)
    folders.damage(source, lambda tensors, config: config.pop("drafttrain"))
    write_about(source, About("eagle", "", "", "", 0, 0))
    with pytest.raises(CheckpointError, match=r"config\.json: no key drafttrain: .* drafttrain import"):
        started("eagle", target, source)
