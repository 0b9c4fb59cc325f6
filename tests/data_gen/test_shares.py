"""Which process reads which records of a step: each record once, limits hold, and the gradient is that of one process."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.config.bundled import bundled_recipes
from drafttrain.config.dump import dump_recipe
from drafttrain.config.load import load_recipe, read_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import RecipeError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.data_gen.sampler import num_micro_batches, own_shares
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.training_data import TrainingData, prepare
from drafttrain.drafters import Drafter, drafters
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss, share_of_step
from drafttrain.target_model import Target
from drafttrain.training.preflight import check_processes
from tests.conftest import byte_tokenizer, random_llama

WORLDS = (1, 2, 4, 8, 64)
KINDS: dict[str, dict[str, Any]] = {
    "causal_lm": {"num_layers": 1, "hidden_size": 16, "num_heads": 1},
    "medusa": {"num_heads": 2},
    "kangaroo": {"exit_layer": 1},
    "eagle": {"num_steps": 2, "feature_noise": 0.0},
    "eagle3": {"num_steps": 2, "draft_vocab_size": 200},
}


def in_world(lengths: list[int], *, at_once: int | None, world_size: int) -> list[list[list[int]]]:
    """Return the shares of all processes."""
    return [
        own_shares(lengths, records_per_device=at_once, rank=rank, world_size=world_size) for rank in range(world_size)
    ]


@given(
    lengths=st.lists(st.integers(1, 2048), min_size=1, max_size=80),
    at_once=st.none() | st.integers(1, 9),
    world_size=st.integers(1, 70),
)
def test_every_record_is_read_once_in_as_few_micro_batches_as_hold_them(
    lengths: list[int], at_once: int | None, world_size: int
) -> None:
    shares = in_world(lengths, at_once=at_once, world_size=world_size)
    assert sorted(record for own in shares for share in own for record in share) == list(range(len(lengths)))
    sizes = [[len(share) for share in own] for own in shares]
    assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
    assert len({len(own) for own in shares}) == 1
    if at_once is None:
        assert len(shares[0]) == 1
    else:
        assert max(map(max, sizes)) <= at_once
        assert (len(shares[0]) - 1) * at_once * world_size < len(lengths)


def test_no_process_waits_long_for_another() -> None:
    """The tokens that each micro-batch waits for, over those that a fair share has; the control deals by number."""
    generator = torch.Generator().manual_seed(0)
    waits, control = [], []
    for _ in range(50):
        lengths = torch.randint(50, 2049, (64,), generator=generator).tolist()
        fair = sum(lengths) / 8
        shares = in_world(lengths, at_once=2, world_size=8)
        tokens = [[sum(lengths[n] for n in share) for share in own] for own in shares]
        waits.append(sum(map(max, zip(*tokens, strict=True))) / fair)
        plain = [[sum(lengths[n] for n in range(rank + 16 * m, 64, 8)[:2]) for m in range(4)] for rank in range(8)]
        control.append(sum(map(max, zip(*plain, strict=True))) / fair)
    assert sum(waits) / 50 < 1.1
    assert sum(control) / 50 > 1.4


@pytest.mark.long
@pytest.mark.parametrize("recipe", [recipe.path for recipe in bundled_recipes()], ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_bundled_recipe_is_divided_among_any_number_of_devices(
    recipe: Path, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "x",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    loaded = load_recipe(recipe)
    check_processes(loaded.name, dump_recipe(loaded), tmp_path, loaded.train)
    phases = [loaded.train, *([loaded.train.of_pretraining()] if loaded.train.pretrain else [])]
    for settings in phases:
        count, most = settings.num_micro_batches(world_size), settings.largest_micro_batch(world_size)
        shares = in_world([1] * settings.batch_size, at_once=settings.records_per_device, world_size=world_size)
        assert {len(own) for own in shares} == {count}
        assert max(len(share) for own in shares for share in own) == most <= (settings.records_per_device or most)


def test_the_error_for_a_former_key_names_its_successor() -> None:
    text = "name: x\ndrafter: {kind: causal_lm}\nloss: {kind: ce}\ndata: {sources: [{kind: stdlib}]}\n"
    with pytest.raises(RecipeError) as refused:
        read_recipe(f"{text}train:\n  batch_size: 16\n  accumulation: 8\n", source="x")
    (problem,) = refused.value.problems
    assert problem.startswith("line 7: train.accumulation: this key was replaced by records_per_device")
    with pytest.raises(RecipeError, match=r"train\.accumulation: this key was replaced by records_per_device"):
        read_recipe(text, ["train.accumulation=2"], source="x")


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")


@pytest.fixture
def data(tmp_path: Path, target: Target) -> TrainingData:
    words = ["the sea", "a longer line about the sea and its many ships", "salt", "waves and wind in the evening"]
    (tmp_path / "text.txt").write_text("\n\n".join(f"{number} {words[number % 4]}" for number in range(40)))
    settings = DataSettings(sources=[TextSettings(path=str(tmp_path / "text.txt"))], max_length=24)
    return prepare(settings, tmp_path / "d", tokenizer=target.tokenizer, tokenizer_fingerprint="x", seed=0)


def gradient(
    made: Drafter, target: Target, batches: list[DraftBatch], *, world_size: int, loss: str = "forward_kl"
) -> dict[str, torch.Tensor]:
    """Return the mean over processes and micro-batches of their gradients, as collectives average them."""
    drafter = copy.deepcopy(made)
    measure = losses.build(losses.entry(loss).settings())
    count = len(batches) // world_size
    trained = {name: parameter for name, parameter in drafter.named_parameters() if parameter.requires_grad}
    sums: dict[str, Any] = {}
    names: list[set[str]] = []
    for batch in batches:
        seen = target.read(batch.tokens_BT, batch.positions_BT, drafter.needs() | TargetNeeds(final=True))
        batch = replace(batch, target=seen, target_rows=target.rows_of(seen))
        made_loss = batch_loss(drafter, measure, batch, vocab_size=target.num_tokens)
        total = share_of_step(made_loss.total, batch, world_size=world_size, accumulation=count)
        parts = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        found = {name: part for name, part in zip(trained, parts, strict=True) if part is not None}
        names.append(set(found))
        for name, part in found.items():
            sums[name] = sums.get(name, 0) + part / len(batches)
    assert all(one == names[0] for one in names), "a process without records takes another backward pass"
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_step_is_the_same_in_any_world(kind: str, data: TrainingData, target: Target) -> None:
    torch.manual_seed(0)
    entry: Any = drafters.entry(kind)
    made = entry.component.create(entry.settings(**KINDS[kind]), target=target, tokenizer=target.tokenizer).train()
    made.fit_vocabulary(data.label_counts)
    size = 5
    whole = gradient(made, target, data.of_step(3, batch_size=size), world_size=1)
    assert whole
    for world_size, at_once in product((1, 2, 3, 8), (None, 1, 2)):
        batches = [
            batch
            for rank in range(world_size)
            for batch in data.of_step(3, batch_size=size, records_per_device=at_once, rank=rank, world_size=world_size)
        ]
        assert len(batches) == world_size * num_micro_batches(size, records_per_device=at_once, world_size=world_size)
        parts = gradient(made, target, batches, world_size=world_size)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=f"{world_size} {at_once} {name}")
    # Control: micro-batches weighted by themselves give another gradient.
    own = [
        replace(batch, weight_of_step=float(batch.loss_mask_BT[:, 1:].sum()) * 3)
        for batch in (b for rank in range(3) for b in data.of_step(3, batch_size=size, rank=rank, world_size=3))
    ]
    wrong = gradient(made, target, own, world_size=3)
    assert any(not torch.allclose(wrong[name], value, rtol=1e-3, atol=1e-5) for name, value in whole.items())


def test_a_micro_batch_without_records_counts_nothing(data: TrainingData) -> None:
    batches = [b for rank in range(4) for b in data.of_step(0, batch_size=2, rank=rank, world_size=4)]
    assert sorted(batch.num_tokens > 0 for batch in batches) == [False, False, True, True]
    assert [int(batch.loss_mask_BT.sum()) for batch in batches if not batch.num_tokens] == [0, 0]
    assert len({batch.weight_of_step for batch in batches}) == 1
    assert sum(len(batch.record_ids) for batch in batches) == 2


def test_a_recipe_is_divided_as_it_says(tmp_path: Path) -> None:
    settings = load_recipe("eagle3_llama3.1_8b").train
    assert (settings.batch_size, settings.records_per_device) == (16, 2)
    assert [settings.num_micro_batches(size) for size in WORLDS] == [8, 4, 2, 1, 1]
    assert [settings.largest_micro_batch(size) for size in WORLDS] == [2, 2, 2, 2, 1]
