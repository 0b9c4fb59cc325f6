"""drafttrain plan: what a recipe costs, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from drafttrain.commands.plan_header import write_figures
from drafttrain.config.recipe import Recipe
from drafttrain.config.searched import is_searched
from drafttrain.core.console import say, table
from drafttrain.core.errors import DrafttrainError, RecipeError
from drafttrain.core.gpus import MEMORY_AND_BANDWIDTH, RESERVED_BYTES, gpu_named
from drafttrain.pipeline.plan import COUNTED, EXACT, Plan, memory_of_parts, plan_of, size_in_gb
from drafttrain.pipeline.run import quiet_libraries
from drafttrain.pipeline.search_plan import SearchPlan, search_plan_of

FORMULA = "formula"
CPU = "cpu"


def print_plan(
    recipe: Recipe, *, gpu: str, utilization: float, records: int | None, header: Path | None = None
) -> None:
    """Print the cost of a recipe's training.

    Args:
        gpu: A name of the table, or `cpu`.
        utilization: Share of its peak, above 0 and at most 1.
        records: Records of an epoch; None: as the recipe gives them.
        header: The file of the recipe, to write the figures into its comment at the top; None: nothing is written.

    Raises:
        RecipeError: An argument is wrong, or the recipe cannot be planned.
        DrafttrainError: The training does not fit on the GPU. The message has what to change, the cheapest first.
    """
    chosen, problems = gpu_named(gpu), []
    if chosen is None and gpu != CPU:
        problems.append(f"--gpu: unknown GPU {gpu!r}. Available: {', '.join(MEMORY_AND_BANDWIDTH)}, {CPU}")
    if not 0 < utilization <= 1:
        problems.append(f"--mfu: must be above 0 and at most 1, got {utilization:g}")
    if problems:
        raise RecipeError("arguments", problems)
    quiet_libraries()
    made: Plan | SearchPlan
    if recipe.drafter is not None and is_searched(recipe.drafter.kind):
        made = search_plan_of(recipe, chosen, utilization=utilization)
        table(list(made.figures()), columns=["search", ""])
    else:
        made = plan_of(recipe, chosen, utilization=utilization, records=records)
        _print_training(made)
    if header is not None:
        write_figures(header, made)
        say(f"written: {header}")
    if changes := made.changes():
        assert chosen is not None
        lacking = (made.memory + RESERVED_BYTES - chosen.memory_bytes) / 1e9
        head = f"does not fit: {lacking:.1f} GB more than {chosen.name} has. What helps, the cheapest first:"
        raise DrafttrainError("\n  ".join([head, *changes]))


def _print_training(plan: Plan) -> None:
    table(list(_parameters(plan)), columns=["parameters", "number", "how"])
    table(list(_memory(plan)), columns=["on a device", "GB", "how"], title="\nMemory")
    table(list(_work(plan)), columns=["training", "", "how"], title="\nWork")


def _parameters(plan: Plan) -> Iterator[list[str]]:
    yield ["trained", f"{plan.cost.trained:,}", EXACT]
    yield ["frozen", f"{plan.cost.frozen:,}", EXACT]


def _memory(plan: Plan) -> Iterator[list[str]]:
    for name, num_bytes, how in memory_of_parts(plan):
        yield [name, size_in_gb(num_bytes), how]
    if plan.gpu is not None:
        yield [f"memory of {plan.gpu.name}", size_in_gb(plan.gpu.memory_bytes), "data sheet"]


def _work(plan: Plan) -> Iterator[list[str]]:
    cost, settings = plan.cost, plan.settings
    executed = plan.flops_per_step * cost.executed / cost.needed
    yield ["cache on disk (GB), at most", size_in_gb(plan.cache_bytes), FORMULA]
    yield ["tokens a step, at most", f"{plan.tokens_per_step:,}", FORMULA]
    yield ["steps", f"{settings.max_steps:,}", "recipe"]
    if settings.pretrain is not None:
        yield ["steps of train.pretrain before them", f"{settings.pretrain.max_steps:,}", "not counted"]
    if plan.steps_per_epoch is None:
        yield ["steps an epoch", "not known: --records", ""]
    else:
        yield ["steps an epoch", f"{plan.steps_per_epoch:,}", FORMULA]
        yield ["epochs", f"{settings.max_steps / plan.steps_per_epoch:.2f}", FORMULA]
    yield ["TFLOP a step that are needed", f"{plan.flops_per_step / 1e12:,.4g}", FORMULA]
    yield ["TFLOP a step that are run", f"{executed / 1e12:,.4g}", COUNTED]
    if plan.gpu is None or plan.step_seconds is None:
        return
    devices = f"{plan.processes} x {plan.gpu.name}" if plan.processes > 1 else plan.gpu.name
    rate = f"{plan.gpu.peak_flops / 1e12:,.0f} TFLOP/s, {plan.gpu.bandwidth / 1e9:,.0f} GB/s"
    yield [f"seconds a step on {devices}", f"{plan.step_seconds:,.3g}", f"formula: {plan.utilization:.0%} of {rate}"]
    yield ["hours", f"{plan.hours:,.2f}", "without texts, cache, validation and evaluation"]
