"""Where the target is while a drafter is trained changes no number: whole, spread over the processes, or not loaded at all."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import CheckpointError, DataError, RecipeError
from drafttrain.pipeline import judging
from drafttrain.pipeline.data import training_data, write_texts
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.target_model.anatomy import blocks
from tests.conftest import random_llama
from tests.distributed.test_two_processes import RECIPE, command
from tests.marks import slow
from tests.training.kills import rows

KINDS = {
    "causal_lm": "{kind: causal_lm, num_layers: 1, hidden_size: 16, num_heads: 1}",
    "medusa": "{kind: medusa, num_heads: 2}",
    "kangaroo": "{kind: kangaroo, exit_layer: 1}",
    "eagle": "{kind: eagle, num_steps: 2}",
    "eagle3": "{kind: eagle3, num_steps: 2, draft_vocab_size: 40}",
}
ABSENT = "train.target_placement=absent"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, save_llama: Any) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    lines = [json.dumps({"id": str(i), "text": f"prompt number {i} is here"}) for i in range(6)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    path = folder / "pair.yaml"
    text = RECIPE.format(target=save_llama(num_layers=3), prompts=folder / "prompts.jsonl")
    path.write_text(text.replace("cache: top_k", "cache: states").replace("num_records: 12", "num_records: 9"))
    return path


def trained(recipe: Path, folder: Path, *overrides: str) -> DrafterRun:
    """Train a drafter and export it, without the evaluation that needs a target."""
    loaded = load_recipe(recipe, list(overrides))
    run = DrafterRun(loaded, folder, placement=loaded.train.target_placement)
    run.train()
    run.export_best()
    return run


@pytest.fixture
def no_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt of transformers to read a model's weights from now on is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was read")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)


def target_layers_in_memory() -> list[Any]:
    """Return the decoder layers of the target's width whose weights are in memory."""
    gc.collect()
    layer = type(blocks(random_llama())[0])
    found = [one for one in gc.get_objects() if type(one) is layer and one.hidden_size == 32]
    return [one for one in found if not all(parameter.is_meta for parameter in one.parameters())]


@pytest.mark.parametrize("kind", [slow("causal_lm"), "medusa", "kangaroo", slow("eagle"), "eagle3"])
def test_every_kind_trains_from_what_was_stored_and_its_target_is_never_read(
    kind: str, recipe: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    of_kind = [f"drafter={KINDS[kind]}", "train.max_steps=3"]
    gen(load_recipe(recipe, [*of_kind, ABSENT]), tmp_path / "absent")
    request.getfixturevalue("no_model_is_read")
    run = trained(recipe, tmp_path / "absent", *of_kind, ABSENT)
    assert all(parameter.is_meta for parameter in blocks(run.target.model).parameters())
    with pytest.raises(CheckpointError, match="a model was read"):
        assert DrafterRun(load_recipe(recipe), tmp_path / "control").target
    request.getfixturevalue("monkeypatch").undo()
    DrafterRun(load_recipe(recipe, of_kind), tmp_path / "absent")  # It is the same run, wherever its target is.
    gen(load_recipe(recipe, of_kind), tmp_path / "whole")
    trained(recipe, tmp_path / "whole", *of_kind)
    assert rows(tmp_path / "absent") == rows(tmp_path / "whole"), "validation included"
    for file in (tmp_path / "whole" / "drafter").glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "absent" / "drafter" / file.name), load_file(file)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for tree in (tmp_path / "whole" / "drafter").glob("medusa_tree.json"):
        assert (tmp_path / "absent" / "drafter" / tree.name).read_text() == tree.read_text()


def test_a_target_is_loaded_for_what_is_missing_and_let_go_of_before_the_training(recipe: Path, tmp_path: Path) -> None:
    before = len(target_layers_in_memory())
    loaded = load_recipe(recipe, [ABSENT, f"drafter={KINDS['causal_lm']}", "train.max_steps=3", "train.device=cpu"])
    run = DrafterRun(loaded, tmp_path / "run", placement="absent")
    write_texts(run)
    assert len(target_layers_in_memory()) == before + 3, "the census sees a target that is loaded"
    run.train()
    assert len(target_layers_in_memory()) == before


class Looked(Exception):
    """What was seen where the evaluation would have started."""


def test_the_evaluation_starts_when_the_training_has_let_go_of_its_target(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(_: DrafterRun) -> None:
        raise Looked(len(target_layers_in_memory()))

    before = len(target_layers_in_memory())
    run = DrafterRun(load_recipe(recipe, [f"drafter={KINDS['kangaroo']}", "train.max_steps=2"]), tmp_path / "run")
    write_texts(run)
    run.train()
    assert len(target_layers_in_memory()) == before + 3
    monkeypatch.setattr(judging, "evaluate_in_new_process", look)
    with pytest.raises(Looked, match=f"^{before}$"):
        judging.export_and_judge(run)


def test_a_text_that_was_not_stored_is_refused(recipe: Path, tmp_path: Path) -> None:
    run = DrafterRun(load_recipe(recipe, [ABSENT]), tmp_path / "run", placement="absent")
    write_texts(run)
    training_data(run)
    target = run.validation.target
    tokens_BT = torch.arange(1, 7)[None]
    with pytest.raises(DataError, match="not one of the 1 stored validation texts"):
        target.read(tokens_BT, torch.arange(6)[None], run.drafter.needs())
    with pytest.raises(CheckpointError, match="is not loaded"):
        run.target.read(tokens_BT, torch.arange(6)[None], run.drafter.needs())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([ABSENT, "data.cache=none"], "absent: nothing of the target is stored with data.cache none"),
        ([ABSENT, "data.cache=none", "loss={kind: ce}"], None),
        ([ABSENT, "drafter={kind: causal_lm, init: target}"], "absent: drafter.init: target cuts the drafter from"),
        ([ABSENT, "drafter={kind: medusa, joint: {}}"], "absent: drafter.joint: the target's own blocks are trained"),
        (
            ["train.target_placement=sharded", "drafter={kind: medusa, joint: {}}", "data.cache=none"],
            "sharded: drafter.joint: the target's own blocks are trained",
        ),
        (
            ["train.target_placement=sharded", "train.devices=1"],
            "sharded: a target cannot be sharded with train.devices 1",
        ),
        (["train.target_placement=sharded", "target.device=cpu"], "leave target.device at auto, got cpu"),
        (["train.target_placement=sharded", "data.cache=none"], None),
        (["train.device=cuda:1", "train.devices=2"], "train.device: cuda:1 is one device, for 2 processes"),
        (
            ["train.device=cuda:1", "drafter={kind: medusa, joint: {}}", "data.cache=none"],
            "drafter.joint trains adapters",
        ),
        (["train.device=cpu"], None),
        (["train.target_placement=elsewhere"], "must be one of replicated, sharded, absent"),
    ],
)
def test_what_a_placement_does_not_allow_is_said_by_the_recipe(
    overrides: list[str], expected: str | None, recipe: Path
) -> None:
    if expected is None:
        load_recipe(recipe, overrides)
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["tiny_judge", "online"])
def test_recipes_that_run_their_target_say_so(name: str) -> None:
    with pytest.raises(RecipeError, match="replicated"):
        load_recipe(name, ["train.target_placement=sharded"])


@pytest.mark.processes
def test_two_processes_that_share_a_target_write_cache_and_train_as_one(recipe: Path, tmp_path: Path) -> None:
    drafter = f"drafter={KINDS['medusa']}"
    sharded = ("train.devices=2", "train.deepspeed.stage=3", "train.target_placement=sharded")
    done = command("fit", recipe, "--runs", tmp_path / "two", drafter, *sharded)
    assert done.returncode == 0, done.stderr[-4000:]
    gen(load_recipe(recipe, [drafter]), tmp_path / "one")
    trained(recipe, tmp_path / "one", drafter)
    one, two = tmp_path / "one", tmp_path / "two" / "pair"
    for made in [*(one / "data").rglob("*.jsonl"), *(one / "data").rglob("*.npy")]:
        assert (two / made.relative_to(one)).read_bytes() == made.read_bytes(), made.name
    for name, weight in load_file(one / "drafter" / "model.safetensors").items():
        torch.testing.assert_close(load_file(two / "drafter" / "model.safetensors")[name], weight, atol=1e-6, rtol=1e-5)
    assert (two / "drafter" / "medusa_tree.json").read_text() == (one / "drafter" / "medusa_tree.json").read_text()
