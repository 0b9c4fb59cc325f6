"""A plan against what a real step takes: exact bytes where sizes decide, and the allocator's and torch's own counts elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from drafttrain.config.load import load_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.losses.step import batch_loss, with_plan
from drafttrain.pipeline.plan import Plan, plan_of
from drafttrain.target_model import Target
from drafttrain.training.gpus import MEMORY_AND_BANDWIDTH, Gpu
from drafttrain.training.optimizer import build_optimizer
from tests.cli.test_cli import call
from tests.marks import slow

SMALL = ["data.max_length=96", "train.batch_size=8", "train.records_per_device=4", "data.cache=none"]


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [*SMALL, *overrides])


@dataclass(frozen=True)
class Measured:
    """What the second micro-batch of a real step on the CPU takes, in the names of a plan's cost."""

    trained: int
    frozen: int
    target_bytes: int
    drafter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kept: int
    logits: int
    peak: int
    executed: int


def size_of(tensors: Any) -> int:
    return sum({one.data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


class Global:
    """In place of torch's tracker of modules, whose hooks autograd refuses inside the loss: all counts are global."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flops_of(run: Callable[[], None]) -> int:
    """Return what torch counts, with the products in place that it knows no formula of."""
    aten, in_place = torch.ops.aten, {}
    for one, like in ((aten.addmm_, aten.addmm), (aten.baddbmm_, aten.baddbmm)):
        in_place[one] = partial(flop_registry[like])
        # It is wrapped already.
        in_place[one]._get_raw = True
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    counter.mod_tracker = Global()
    with counter:
        run()
    return int(counter.get_total_flops())


def allocations(profiled: profile) -> list[tuple[int, int]]:
    """Return (address, bytes) of what torch's allocator gave to the profiled code, and negative ones of what it got back."""
    found, left = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if isinstance(event.extra_fields, _ExtraFields_Allocation):
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(place, size) for _, place, size in sorted(found)]


def most(sizes: Iterable[int]) -> int:
    """Return the most bytes that were there at once."""
    return max(accumulate(sizes))


def given_back(made: list[tuple[int, int]]) -> list[int]:
    """Return the sizes of what was given back before the end: not those of results."""
    open_at: dict[int, int] = {}
    sizes = [0] * len(made)
    for number, (place, size) in enumerate(made):
        if size > 0:
            open_at[place] = number
        elif (first := open_at.pop(place, None)) is not None:
            sizes[first], sizes[number] = made[first][1], size
    return sizes


def measured(recipe: Recipe) -> Measured:
    """Take two micro-batches and a step of the optimizer with the real target, and measure the second one."""
    target = Target.load(replace(recipe.target, dtype="float32"))
    component: Any = drafters.entry(recipe.drafter.kind).component
    drafter = component.for_training(recipe.drafter, target=target, tokenizer=target.tokenizer).train()
    loss, width = losses.build(recipe.loss), recipe.data.max_length
    records = [Record(str(row), [1] * width, [True] * width) for row in range(recipe.train.largest_micro_batch(1))]
    batch = with_plan(drafter, loss, replace(pack(records, width=width, weight_of_step=1.0)[0], num_steps=2))
    settings: dict[str, Any] = {"vocab_size": target.num_tokens, "chunk_rows": recipe.train.loss_chunk_rows}
    own = {one.untyped_storage().data_ptr() for one in [*drafter.parameters(), *drafter.buffers()]}
    kept: dict[int, Any] = {}
    in_loss: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    def drafted(batch: DraftBatch) -> DraftOutput:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return component.forward(drafter, batch)

    def micro_batch(draft: Any) -> None:
        needs = drafter.needs() | TargetNeeds(final=loss.needs_target)
        seen = target.read(batch.tokens_BT, batch.positions_BT, needs, documents=batch.packed_documents)
        rows = target.rows_of(seen) if loss.needs_target else None
        batch_loss(draft, loss, replace(batch, target=seen, target_rows=rows), **settings).total.backward()

    def measured_draft(batch: DraftBatch) -> DraftOutput:
        output = component.forward(drafter, batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            held = batch_loss(lambda _: output, loss, batch, **settings)
        # What is left are the gradients of states and head.
        in_loss.append(most(given_back(allocations(profiled))))
        del held
        return output

    micro_batch(drafted)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        micro_batch(drafter)
    executed = flops_of(lambda: micro_batch(drafter))
    micro_batch(measured_draft)
    optimizer = build_optimizer(drafter, recipe.train)
    optimizer.step()
    state = [one for states in optimizer.state.values() for one in states.values() if isinstance(one, torch.Tensor)]
    gradients = size_of(p.grad for p in drafter.parameters() if p.grad is not None)
    frozen = [*target.model.parameters(), *(p for p in drafter.parameters() if not p.requires_grad)]
    return Measured(
        trained=sum(p.numel() for p in drafter.parameters() if p.requires_grad),
        frozen=sum({id(p): p.numel() for p in frozen}.values()),
        target_bytes=size_of([*target.model.parameters(), *target.model.buffers()]),
        drafter_bytes=size_of([*drafter.parameters(), *drafter.buffers()]),
        gradient_bytes=gradients,
        optimizer_bytes=sum(one.numel() * one.element_size() for one in state),
        kept=sum(storage.nbytes() for storage in kept.values()),
        logits=in_loss[0],
        # The gradients were there before.
        peak=most(size for _, size in allocations(profiled)) + gradients,
        executed=executed,
    )


@pytest.fixture(scope="module")
def eagle() -> Plan:
    return plan_of(recipe_of("tiny_eagle"), Gpu("h100"))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("tiny_eagle3", "muon"),
        slow("tiny_medusa", "adamw"),
        slow("tiny_dflash", "muon"),
    ],
)
def test_a_plan_is_what_a_real_step_takes(name: str, optimizer: str) -> None:
    recipe = recipe_of(name, f"train.optimizer={optimizer}")
    cost, real = plan_of(recipe, None).cost, measured(recipe)
    for exact in ("trained", "frozen", "target_bytes", "drafter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(cost, exact) == getattr(real, exact), exact
    for near in ("kept", "logits", "peak"):
        assert getattr(cost, near) == pytest.approx(getattr(real, near), rel=0.15), near
    assert cost.executed == pytest.approx(real.executed, rel=0.1)


def test_a_plan_counts_adapters_and_what_is_frozen_beside_them() -> None:
    lora = "drafter.lora={rank: 4, target_modules: [q_proj, down_proj]}"
    recipe = recipe_of("demo", lora, "data.generate.num_records=64")
    cost, real, whole = plan_of(recipe, None).cost, measured(recipe), plan_of(recipe_of("demo"), None).cost
    for exact in ("trained", "frozen", "target_bytes", "drafter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(cost, exact) == getattr(real, exact), exact
    assert cost.executed == pytest.approx(real.executed, rel=0.1)
    config = json.loads(Path("src/drafttrain/builtin/drafter/config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * config["head_dim"]
    assert cost.trained == layers * 4 * ((width + queries) + (inner + width))
    assert cost.frozen == whole.frozen + whole.trained
    assert cost.needed == pytest.approx(cost.executed, rel=0.02)
    assert cost.needed < 0.95 * whole.needed, "the gradients of frozen weights are not counted"


def test_control_a_step_of_another_length_in_other_pieces_is_not_what_was_planned() -> None:
    planned, real = (
        plan_of(recipe_of("tiny_medusa"), None).cost,
        measured(recipe_of("tiny_medusa", "data.max_length=72", "train.loss_chunk_rows=100")),
    )
    for near in ("kept", "logits", "executed"):
        assert getattr(planned, near) != pytest.approx(getattr(real, near), rel=0.15), near


def test_of_a_target_only_its_config_is_read(tmp_path: Path, eagle: Plan) -> None:
    whole = Path(Target.load(eagle.recipe.target).model.config._name_or_path)
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    plan = plan_of(recipe_of("tiny_eagle", f"target.model={tmp_path}"), eagle.gpu)
    assert plan.cost.trained == eagle.cost.trained
    assert plan.cost.target_bytes == eagle.cost.target_bytes
    assert plan.cost.executed == pytest.approx(eagle.cost.executed, rel=0.1)


def test_a_large_target_is_planned_in_16_bits(tmp_path: Path) -> None:
    """One block of 8 B sizes; `dtype: auto` of a GPU depends on the number of weights."""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 1, "intermediate_size": 14336}
    config = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cost = plan_of(recipe_of("tiny_eagle", f"target.model={tmp_path}"), Gpu("h100")).cost
    assert cost.target_bytes == pytest.approx(2 * (2 * 128256 * 4096 + 4 * 4096**2 + 3 * 4096 * 14336), rel=1e-4)


def test_a_cache_replaces_the_target(eagle: Plan) -> None:
    cached = plan_of(recipe_of("tiny_eagle", "data.cache=states"), eagle.gpu, records=480)
    assert eagle.cache_bytes == 0
    # EAGLE reads the final state, from which the distribution is computed too.
    width = 4 * Target.load(eagle.recipe.target).model.config.hidden_size
    assert cached.cache_bytes == 480 * 96 * width
    in_bytes = plan_of(recipe_of("tiny_eagle", "data.cache=states", "data.cache_dtype=int8"), eagle.gpu, records=480)
    assert in_bytes.cache_bytes == 480 * 96 * (width // 4 + 2 * width // 4 // 32)
    assert cached.cost.executed < eagle.cost.executed
    assert cached.cost.kept == eagle.cost.kept


def test_steps_and_hours_are_computed_from_the_counts(eagle: Plan) -> None:
    assert eagle.records == 480
    assert eagle.steps_per_epoch == 60
    assert eagle.tokens_per_step == 8 * 96
    assert eagle.flops_per_step == 2 * eagle.cost.needed
    halved = replace(eagle, utilization=0.2)
    computed, update = (one.flops_per_step / (one.gpu.peak_flops * one.utilization) for one in (eagle, halved))
    assert halved.step_seconds - eagle.step_seconds == pytest.approx(update - computed)
    assert eagle.hours == pytest.approx(240 * eagle.step_seconds / 3600)


def test_zero_spreads_what_its_stages_spread(eagle: Plan) -> None:
    train = replace(eagle.settings, devices=4, deepspeed=None)
    alone = replace(eagle, recipe=replace(eagle.recipe, train=train))
    settings = load_recipe("tiny_eagle", [*SMALL, "train.devices=4", "train.deepspeed={stage: 2}"]).train
    spread = replace(eagle, recipe=replace(eagle.recipe, train=settings))
    saved = 0.75 * (eagle.cost.optimizer_bytes + eagle.cost.gradient_bytes)
    assert alone.memory == eagle.memory == eagle.cost.memory
    assert eagle.memory - spread.memory == pytest.approx(saved)


def test_what_does_not_fit_is_answered_with_what_helps(eagle: Plan) -> None:
    assert eagle.changes() == []
    large = replace(eagle, cost=replace(eagle.cost, peak=90 * 10**9, logits=3 * 10**9))
    changes = large.changes()
    assert changes[0].startswith("train.records_per_device=2 (now 4)")
    assert "up to 3.00 GB at once" in changes[1]
    assert any("activation_checkpointing" in change for change in changes)
    # Medusa has no activations that could be computed again.
    medusa = replace(large, recipe=recipe_of("tiny_medusa")).changes()
    assert not any("activation_checkpointing" in change for change in medusa)
    assert "h200" in changes[-1]
    assert "h100" not in changes[-1].split(": ")[1].split(", ")


@pytest.mark.parametrize("name", MEMORY_AND_BANDWIDTH)
def test_every_gpu_has_a_peak(name: str) -> None:
    assert Gpu(name).peak_flops > 5e13


def test_the_command_prints_the_tables() -> None:
    out, err = call("plan", "tiny_eagle", "--gpu", "h100", *SMALL)
    assert "467,136" in out
    assert re.search(r"hours +0\.0", out)
    assert "does not fit" not in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tiny_eagle", "--gpu", "h900"], "unknown GPU 'h900'. Available: b200, h200"),
        (["tiny_eagle", "--mfu", "0"], "--mfu: must be above 0"),
        (["tiny_acceptance"], "trains a head"),
        (["builtin_drafter"], "target.model: a plan needs the sizes of a target"),
        (["tiny_eagle", "target.model=recipe:demo"], "is made by another recipe"),
        (["direct_alignment", "drafter.tokenizer=builtin:target"], "drafter.tokenizer: a plan does not know"),
    ],
)
def test_what_cannot_be_planned_is_named(words: list[str], problem: str) -> None:
    assert problem in " ".join(call("plan", *words, code=RecipeError.exit_code)[1].split())


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json here"):
        plan_of(recipe_of("tiny_eagle", f"target.model={tmp_path}"), None)
