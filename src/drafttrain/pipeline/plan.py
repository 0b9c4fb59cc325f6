"""What a recipe costs, before anything large is loaded: of the target only its config.json is read.

Parameters and the bytes of weights, gradients and optimizer are exact for the sizes; operations, activations and logits are those
of one micro-batch of full rows, counted on tensors without data (`training.step_cost`); the rest is computed from these by formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

from drafttrain.config.made_by import MADE_BY
from drafttrain.config.recipe import Recipe
from drafttrain.config.searched import is_searched
from drafttrain.core.errors import RecipeError
from drafttrain.core.gpus import MEMORY_AND_BANDWIDTH, RESERVED_BYTES, Gpu
from drafttrain.data_gen.states import states
from drafttrain.data_gen.stored.wanted import Wanted
from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.target_model.sized_target import SizedTarget
from drafttrain.training.precision import SLOWER_THAN_BFLOAT16, SLOWER_THAN_TF32
from drafttrain.training.settings import TrainSettings
from drafttrain.training.step_cost import StepCost, Trained, step_cost
from drafttrain.training.what_helps import what_helps

SHARDED_FROM_STAGE = {"optimizer_bytes": 1, "gradient_bytes": 2, "drafter_bytes": 3}
"""From which ZeRO stage on each process holds its share of these."""
EXACT, COUNTED, ASSUMED = "exact", "counted", "assumed"
"""How a figure of a plan is known."""
UTILIZATION = 0.4
"""Share of a GPU's peak that is assumed, not measured."""


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe, for each device."""

    recipe: Recipe
    cost: StepCost
    """Of one micro-batch."""
    gpu: Gpu | None
    """None: a CPU, of which neither peak nor memory is known."""
    utilization: float
    records: int | None
    """Records of an epoch; None: not known before the texts are encoded."""
    cache_row: int
    """Bytes of the target's outputs that are stored for a token."""

    @property
    def settings(self) -> TrainSettings:
        """The settings of the training."""
        return self.recipe.train

    @property
    def processes(self) -> int:
        """Devices that train together."""
        return self.settings.devices or 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, at most: records can be shorter than `data.max_length`."""
        return self.settings.batch_size * self.recipe.data.max_length

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps that read every record once."""
        return None if self.records is None else ceil(self.records / self.settings.batch_size)

    @property
    def cache_bytes(self) -> int:
        """Bytes of `data.cache` on the disk, at most."""
        visited = self.settings.max_steps * self.settings.batch_size
        return self.cache_row * self.recipe.data.max_length * min(visited, self.records or visited)

    @property
    def flops_per_step(self) -> float:
        """Operations that an optimizer step needs, over all devices."""
        return self.cost.needed * self.tokens_per_step / self.cost.positions

    def held(self, part: str) -> float:
        """Return the bytes of a part of the cost on one device, as ZeRO and `target_placement` spread it."""
        whole: int = getattr(self.cost, part)
        if part == "target_bytes":
            left = {"replicated": 1.0, "sharded": 1 / self.processes, "absent": 0.0}[self.settings.target_placement]
            return whole - self.cost.blocks_bytes * (1 - left)
        if part == "optimizer_bytes" and self.settings.deepspeed is not None and self.settings.deepspeed.offloads:
            return 0.0
        return whole / (self.processes if self.settings.zero_stage >= SHARDED_FROM_STAGE[part] else 1)

    @property
    def memory(self) -> float:
        """Bytes at the peak on one device; a GPU's context and fragmentation come on top."""
        gradients_elsewhere = self.cost.gradient_bytes - self.held("gradient_bytes")
        weights = sum(self.held(part) for part in ("target_bytes", "drafter_bytes", "optimizer_bytes"))
        return weights + self.cost.peak - gradients_elsewhere

    @property
    def step_seconds(self) -> float | None:
        """Time of an optimizer step: its operations at the utilization, and the update at the memory's bandwidth."""
        if self.gpu is None:
            return None
        rate = self.gpu.peak_flops * self.utilization * self.processes
        if self.settings.on("cuda").precision == "fp32":
            rate /= SLOWER_THAN_BFLOAT16 / (1 if self.settings.tf32 is False else SLOWER_THAN_TF32)
        # Weights and state are read and written, gradients read.
        moved = 2 * 4 * self.cost.trained + self.held("gradient_bytes") + 2 * self.held("optimizer_bytes")
        return self.flops_per_step / rate + moved / self.gpu.bandwidth

    @property
    def hours(self) -> float | None:
        """Hours of the training, without texts, cache, validations and evaluation."""
        return None if self.step_seconds is None else self.settings.max_steps * self.step_seconds / 3600

    def changes(self) -> list[str]:
        """Return what to change if it does not fit on the GPU; empty: it fits, or it is for a CPU."""
        if self.gpu is None or self.gpu.holds(self.memory):
            return []
        runs, component = (
            self.recipe.data.cache == "none",
            cast(Any, drafters.entry(self.recipe.drafter.kind).component),
        )
        found = what_helps(
            self.settings,
            processes=self.processes,
            trained=self.cost.trained,
            recomputes=component.recomputes,
            blocks_bytes=self.cost.blocks_bytes if runs else None,
            device_type="cuda",
            logits_bytes=self.cost.logits,
        )
        larger = [name for name in MEMORY_AND_BANDWIDTH if Gpu(name).holds(self.memory)]
        needed = f"a GPU of {(self.memory + RESERVED_BYTES) / 1e9:.0f} GB or more"
        return [*found, f"{needed}: {', '.join(larger)}" if larger else f"{needed}; none is in the table"]


def plan_of(recipe: Recipe, gpu: Gpu | None, *, utilization: float = UTILIZATION, records: int | None = None) -> Plan:
    """Return what the training of a recipe's drafter costs.

    Args:
        gpu: None: a CPU.
        records: Records of an epoch; None: those of `data.generate` if no other source is read, else not known.

    Raises:
        RecipeError: The recipe trains no drafter of a target whose sizes are known.
        CheckpointError: There is no config.json of the target, or it describes no causal LM.
    """
    if problems := list(_not_planned(recipe)):
        raise RecipeError(recipe.name, problems)
    device_type = "cpu" if gpu is None else "cuda"
    settings, processes = recipe.train, recipe.train.devices or 1
    made: list[Trained] = []

    def build() -> Trained:
        made.append(sized_parts(recipe, device_type=device_type))
        return made[0]

    cost = step_cost(
        build,
        rows=settings.largest_micro_batch(processes),
        width=recipe.data.max_length,
        accumulates=settings.num_micro_batches(processes) > 1,
        device_type=device_type,
    )
    known = recipe.data.generate if all(one.kind == "generated" for one in recipe.data.sources) else None
    return Plan(
        recipe,
        cost,
        gpu,
        utilization,
        records=records or (known.num_records if known else None),
        cache_row=made[0].bytes_stored(),
    )


def memory_of_parts(plan: Plan) -> Iterator[tuple[str, float, str]]:
    """Yield what takes memory on a device, with its bytes, and how they are known. The peak is not their sum."""
    cost, settings = plan.cost, plan.settings
    batch = f"{settings.largest_micro_batch(plan.processes)} x {plan.recipe.data.max_length} tokens"
    yield "weights of the target", plan.held("target_bytes"), EXACT
    yield "weights of the drafter", plan.held("drafter_bytes"), EXACT
    yield "gradients", plan.held("gradient_bytes"), EXACT
    yield f"state of {settings.optimizer}", plan.held("optimizer_bytes"), EXACT
    yield f"activations that the drafter keeps of {batch}", cost.kept, COUNTED
    yield "logits of the loss, at most", cost.logits, COUNTED
    yield "all together at the peak of a step", plan.memory, COUNTED
    if plan.gpu is not None:
        yield "CUDA's context and fragmentation, about", RESERVED_BYTES, ASSUMED


def size_in_gb(num_bytes: float) -> str:
    """Return GB of 10^9 bytes; small sizes with the digits that they need."""
    size = num_bytes / 1e9
    return f"{size:.1f}" if size >= 10 or size == 0 else f"{size:.3g}"


def sized_parts(recipe: Recipe, *, device_type: str) -> Trained:
    """Return the drafter, loss and target that a recipe trains with, made where tensors have no data.

    Raises:
        RecipeError: The target's outputs that this drafter reads cannot be cached.
        CheckpointError: There is no config.json of the target, or it describes no causal LM.
    """
    target = SizedTarget.of(recipe.target, device_type=device_type)
    component: Any = drafters.entry(recipe.drafter.kind).component
    drafter = component.for_training(recipe.drafter, target=target, tokenizer=target.tokenizer, sized=True)
    loss = losses.build(recipe.loss)
    stored = Wanted.of(recipe.data, distribution=loss.needs_target, needs=drafter.needs())
    if stored is not None and (reason := drafter.why_not_cached()):
        raise RecipeError(recipe.name, [f"data.cache: {recipe.drafter.kind}: {reason}; set data.cache: none"])
    source: Any = states.entry(recipe.data.states.kind).component
    return Trained(drafter, loss, target, target.num_tokens, recipe.train, stored, source.elsewhere)


def _not_planned(recipe: Recipe) -> Iterator[str]:
    """Yield why the cost of a recipe cannot be counted."""
    if recipe.drafter is None:
        yield "head: a plan counts the training of a drafter, and this recipe trains a head, which is small"
    if recipe.drafter is not None and is_searched(recipe.drafter.kind):
        yield f"drafter.kind: {recipe.drafter.kind} has no weights to train: its search has another plan"
    if recipe.target.model is None:
        yield "target.model: a plan needs the sizes of a target, and there is none"
    if getattr(recipe.drafter, "tokenizer", None) is not None:
        yield "drafter.tokenizer: a plan does not know how many tokens of the drafter's own tokenizer a text has: not planned"
    named = {"target.model": recipe.target.model, "drafter.checkpoint": getattr(recipe.drafter, "checkpoint", None)}
    for key, name in named.items():
        if name is not None and name.startswith(MADE_BY):
            yield f"{key}: {name} is made by another recipe. Name the folder that it made, or one with its config.json"
