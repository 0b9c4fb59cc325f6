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
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from drafttrain.config.load import load_recipe
from drafttrain.config.recipe import Recipe
from drafttrain.core.provenance import commit
from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.training.step_cost import StepCost, Trained, step_cost

OUT = Path(__file__).with_suffix(".md")
RECIPES = (
    *("eagle3_llama3.1_8b", "eagle3_qwen3_8b", "eagle3_1_qwen3_8b", "p_eagle_qwen3_8b"),
    *("medusa_llama3.1_8b", "kangaroo_llama3.1_8b", "mtp_mimo_7b", "dflash_qwen3_8b", "dspark_qwen3_8b"),
    "domino_qwen3_8b",
)
"""A drafter that is a language model reads its files when it is created, so it is not included."""
PEAK_FLOPS = 989e12
"""Peak of an H100 or H200 in bf16, dense."""
UTILIZATION = 0.4
"""Assumed, not measured."""

HEADS: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
CONFIGS: dict[str, Callable[[], Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": lambda: LlamaConfig(
        **HEADS,
        vocab_size=128256,
        intermediate_size=14336,
        num_hidden_layers=32,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "Qwen/Qwen3-8B": lambda: Qwen3Config(
        **HEADS, vocab_size=151936, intermediate_size=12288, num_hidden_layers=36, max_position_embeddings=40960
    ),
    "XiaomiMiMo/MiMo-7B-RL": lambda: Qwen2Config(
        **{name: size for name, size in HEADS.items() if name != "head_dim"},
        vocab_size=151680,
        intermediate_size=11008,
        num_hidden_layers=36,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
}
"""The sizes of the models that the recipes name."""

WITHOUT_FILES: dict[str, dict[str, Any]] = {"mtp": {"init": "random", "layout": "mimo"}}
"""Settings with which a kind needs no file of its target."""


class NoTokenizer:
    """A tokenizer without tokens that begin, end or pad texts."""

    bos_token_id = eos_token_id = pad_token_id = None


class Sized(Target):
    """A target without a tokenizer: every id is a token."""

    @property
    def num_tokens(self) -> int:
        """Number of rows of the head."""
        return self.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        """No token ends a text."""
        return ()


def trained(recipe: Recipe) -> Trained:
    """Return the drafter, loss and target that the recipe trains with."""
    assert recipe.target.model is not None
    config = CONFIGS[recipe.target.model]()
    dtype = getattr(torch, recipe.target.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    target = Sized(model, NoTokenizer(), name=recipe.target.model, fingerprint="")
    settings = replace(recipe.drafter, **WITHOUT_FILES.get(recipe.drafter.kind, {}))
    drafter = drafters.entry(recipe.drafter.kind).component.create(settings, target=target, tokenizer=target.tokenizer)
    return Trained(
        drafter, losses.build(recipe.loss), target, target.vocab_size, chunk_rows=recipe.train.loss_chunk_rows
    )


def cost_of(name: str, *, prompt: int = 0) -> tuple[Recipe, StepCost]:
    """Return a recipe and the cost of a micro-batch of full rows."""
    recipe = load_recipe(name)
    cost = step_cost(
        lambda: trained(recipe),
        rows=recipe.train.records_per_device,
        width=recipe.data.max_length,
        prompt=prompt,
        mixed=recipe.train.precision == "bf16-mixed",
    )
    return recipe, cost


def row(name: str) -> str:
    """Return a line of the table."""
    recipe, cost = cost_of(name)
    micro_batches = recipe.train.batch_size / recipe.train.records_per_device
    step = micro_batches * cost.seconds(peak_flops=PEAK_FLOPS, utilisation=UTILIZATION)
    figures = [
        f"{recipe.train.records_per_device} x {recipe.data.max_length}",
        *(
            f"{number / 1e9:.1f}"
            for number in (cost.target_bytes, cost.trained_bytes, cost.kept, cost.peak, cost.memory)
        ),
        f"{cost.needed / cost.positions / 1e9:.1f}",
        f"{cost.executed / cost.needed:.3f}",
        f"{step:.2f}",
        f"{recipe.train.max_steps * step / 3600:.1f}",
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
        f"Times are computed from the operations needed, on one GPU of {PEAK_FLOPS / 1e12:.0f} TFLOP/s, at a utilization of",
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
