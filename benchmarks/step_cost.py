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
from tempfile import TemporaryDirectory
from typing import Any

import torch

from drafttrain.config.load import load_recipe
from drafttrain.core.files import write_json
from drafttrain.core.provenance import commit
from drafttrain.pipeline.plan import UTILIZATION, Plan, plan_of
from drafttrain.training.gpus import Gpu

OUT = Path(__file__).with_suffix(".md")
RECIPES = (
    *("eagle3_llama3.1_8b", "eagle3_qwen3_8b", "eagle3_1_qwen3_8b", "p_eagle_qwen3_8b"),
    *("medusa_llama3.1_8b", "kangaroo_llama3.1_8b", "mtp_mimo_7b", "dflash_qwen3_8b", "dspark_qwen3_8b"),
    *("domino_qwen3_8b", "dflash2_qwen3_8b", "xpress_qwen3_8b", "kd_qwen3_8b_0.6b"),
)
GPU = Gpu("h100")

HEADS: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        **HEADS,
        "model_type": "llama",
        "head_dim": 128,
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "Qwen/Qwen3-8B": {
        **HEADS,
        "model_type": "qwen3",
        "head_dim": 128,
        "vocab_size": 151936,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "XiaomiMiMo/MiMo-7B-RL": {
        **HEADS,
        "model_type": "mimo",
        "vocab_size": 151680,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
"""The sizes of the models that the recipes name, as in their config.json: a plan then needs no hub."""


def planned(name: str) -> Plan:
    """Return the plan of a recipe, with its models' sizes from here."""
    recipe = load_recipe(name)
    with TemporaryDirectory() as folder:
        overrides = []
        for key, model in (
            ("target.model", recipe.target.model),
            ("drafter.checkpoint", getattr(recipe.drafter, "checkpoint", None)),
        ):
            if model is not None:
                of_model = Path(folder) / key
                of_model.mkdir()
                write_json(of_model / "config.json", CONFIGS[model])
                overrides.append(f"{key}={of_model}")
        return plan_of(load_recipe(name, overrides), GPU)


def row(name: str) -> str:
    """Return a line of the table."""
    plan = planned(name)
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
        "Counted with tensors that hold no numbers, at the real sizes, with every row full and every token",
        "trained. Nothing ran on a GPU.",
        f"Times are computed from the operations needed, on one GPU of {GPU.peak_flops / 1e12:.0f} TFLOP/s, at a utilization of",
        f"{UTILIZATION:.0%} that is assumed, not measured. The context and allocator of a GPU take some 2 GB more.",
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
