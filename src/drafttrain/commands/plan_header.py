"""The figures of a plan in the comment at the top of a recipe's file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from drafttrain.core.files import write_text
from drafttrain.pipeline.plan import Plan, memory_of_parts, size_in_gb
from drafttrain.pipeline.search_plan import SearchPlan

FIGURES = re.compile(r"^# Computed by `drafttrain plan`.*\n(?:#   .*\n)*", re.MULTILINE)
"""The line that introduces them, and the lines below it that are indented."""
COMMENT = re.compile(r"(?:#.*\n)*")
WIDTH = 60, 14


def figures(plan: Plan | SearchPlan) -> str:
    """Return the lines with the figures of a plan, as `FIGURES` finds them again."""
    devices = "a CPU" if plan.gpu is None else f"{plan.processes} {plan.gpu.name}"
    name, value = WIDTH
    rows = plan.figures() if isinstance(plan, SearchPlan) else _rows(plan)
    lines = [f"#   {one:<{name}}{figure:>{value}}\n" for one, figure in rows]
    return "".join([f"# Computed by `drafttrain plan` for {devices}, not measured:\n", *lines])


def with_figures(text: str, plan: Plan | SearchPlan) -> str:
    """Return the text of a recipe with these figures in place of its older ones, or at the end of its first comment."""
    if FIGURES.search(text):
        return FIGURES.sub(lambda _: figures(plan), text, count=1)
    comment = COMMENT.match(text)
    assert comment is not None
    head = comment.group()
    return f"{head}{'#' + chr(10) if head else ''}{figures(plan)}{text[len(head) :]}"


def write_figures(path: Path, plan: Plan | SearchPlan) -> None:
    """Write the figures of a plan into the file of its recipe."""
    write_text(path, with_figures(path.read_text(encoding="utf-8"), plan))


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "parameters that are trained", f"{plan.cost.trained:,}"
    for name, num_bytes, _ in memory_of_parts(plan):
        yield name, f"{size_in_gb(num_bytes)} GB"
    if plan.cache_row:
        yield "cache of the target's outputs, of each token", f"{plan.cache_row / 1e3:.1f} kB"
    if plan.gpu is None:
        return
    peak = f"{plan.utilization:.0%} of {plan.gpu.peak_flops / 1e12:,.0f} TFLOP/s"
    yield "GFLOP that each token needs", f"{plan.flops_per_step / plan.tokens_per_step / 1e9:.1f}"
    yield f"seconds of a step of {plan.tokens_per_step:,} tokens, at {peak}", f"{plan.step_seconds:.2f}"
    yield f"hours of {plan.settings.max_steps:,} such steps", f"{plan.hours:.1f}"
