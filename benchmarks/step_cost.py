"""Counts the cost of a training step for drafters of 8 B models, at real sizes, with tensors that hold no numbers. It needs no GPU.

Memory is the peak of all tensors together: weights, AdamW's moments, gradients, activations, logits. A GPU's context and the memory
that its allocator cannot use take some 2 GB more. Operations are counted. The time is computed from the operations needed, at a
utilization that is assumed and not measured.

    python benchmarks/step_cost.py                     writes benchmarks/step_cost.md
    python benchmarks/step_cost.py dflash_qwen3_8b     prints the line of a recipe
"""

from __future__ import annotations

import argparse
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.gpus import Gpu
from drafttrain.core.provenance import commit
from drafttrain.pipeline.plan import UTILIZATION, plan_of

OUT = Path(__file__).with_suffix(".md")
RECIPES = (
    *("eagle3_llama3.1_8b", "eagle3_qwen3_8b", "eagle3_1_qwen3_8b", "p_eagle_qwen3_8b"),
    *("medusa_llama3.1_8b", "kangaroo_llama3.1_8b", "mtp_mimo_7b", "dflash_qwen3_8b", "dspark_qwen3_8b"),
    *("domino_qwen3_8b", "dflash2_qwen3_8b", "xpress_qwen3_8b", "kd_qwen3_8b_0.6b"),
)
GPU = Gpu("h100")


def row(name: str) -> str:
    """Return a line of the table."""
    plan = plan_of(load_recipe(name), GPU)
    cost, settings = plan.cost, plan.settings
    figures = [
        f"{settings.records_per_device} x {plan.recipe.data.max_length}",
        *(
            f"{number / 1e9:.1f}"
            for number in (cost.target_bytes, cost.trained_bytes, cost.kept, cost.peak, plan.memory)
        ),
        f"{cost.needed / cost.positions / 1e9:.1f}",
        f"{cost.executed / cost.needed:.3f}",
        f"{plan.step_seconds:.2f}",
        f"{plan.hours:.1f}",
    ]
    return f"| {name} | {' | '.join(figures)} |"


def main() -> None:
    """Count and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="Print the lines of these alone.")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.recipes:
        print(*map(row, arguments.recipes), sep="\n")
        return
    head = (
        "recipe",
        "micro-batch",
        *(
            "target GB",
            "weights and AdamW GB",
            "saved by the drafter's forward GB",
            "peak beyond weights GB",
            "total GB",
        ),
        *("needed GFLOP per position", "executed / needed", "s per step", "hours"),
    )
    lines = [
        "# What a step of training a drafter for 8 B models costs",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, torch {torch.__version__}, Python {platform.python_version()}.",
        "Counted with tensors that hold no numbers, at the real sizes, with every row full, every token trained,",
        "and the gradients of earlier micro-batches there. Nothing ran on a GPU.",
        f"Times are computed from the operations needed, on one GPU of {GPU.peak_flops / 1e12:.0f} TFLOP/s, at a utilization of",
        f"{UTILIZATION:.0%} that is assumed, not measured. The context and allocator of a GPU take some 2 GB more.",
        "The recipes' headers have the same figures (`drafttrain plan RECIPE --header`).",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *map(row, RECIPES),
        "",
    ]
    arguments.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
