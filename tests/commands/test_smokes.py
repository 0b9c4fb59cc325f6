"""Every bundled recipe with `--smoke`, through all of its stages."""

from __future__ import annotations

import pytest

from drafttrain.commands.fit import fit
from drafttrain.config.bundled import bundled_recipes
from drafttrain.config.load import load_recipe

EMBEDDED = [
    "target.model=builtin:target",
    "target.dtype=float32",
    "data.generate.prompts={kind: stdlib}",
    "data.generate.backend={kind: builtin}",
    "train.precision=fp32",
]
"""A recipe for a real target, on the embedded one."""
EMBEDDED_TEXT = ["eval.prompts=builtin:test", "eval.validation_prompts=builtin:validation"]
"""Prompts for a target without a chat template."""


IN_CI = {"online", "direct_alignment", "tiny_distillspec_sampled", "tiny_acceptance"}
"""Longer ones, whose parts have tests of their own."""


def smoked(name: str) -> object:
    """The whole path of recipes whose kind, or whose kind of block, a tiny one smokes is left to the long tests."""
    long = (
        name.endswith(("_8b", "_7b", "_0.6b"))
        or name.startswith("smollm2_")
        or name
        in {
            # `tests/test_examples.py` runs the demo's smoke, unshortened.
            "demo",
            # The first phase of `direct_alignment`.
            "builtin_drafter",
            "tiny_medusa2",
            "tiny_p_eagle",
            "tiny_dspark",
            "tiny_domino",
            "tiny_dflash2",
            "tiny_xpress",
            "tiny_distillspec_greedy",
            "tiny_matformer",
            "llava_1_5_7b_msd",
        }
    )
    marks = [pytest.mark.slow] if long else [pytest.mark.long] if name in IN_CI else []
    return pytest.param(name, marks=marks)


@pytest.mark.usefixtures("evaluated_here")
@pytest.mark.parametrize("name", [smoked(one.name) for one in bundled_recipes()])
def test_every_recipe_runs_with_smoke(name, tmp_path):
    """The path of every bundled recipe, shrunk; models that are not here, or that take minutes, are builtin ones."""
    overrides = {
        "kd_qwen3_8b_0.6b": [
            "target.model=builtin:target",
            "target.dtype=float32",
            "drafter.checkpoint=builtin:drafter",
            "data.generate.prompts={kind: stdlib}",
            "data.generate.backend={kind: builtin}",
            "train.precision=fp32",
        ],
        "sorted_qwen3_8b_0.6b": [*EMBEDDED, "drafter.checkpoint=builtin:drafter", "drafter.exits=[1]"],
        "matformer_qwen3_8b_0.6b": [*EMBEDDED, "drafter.checkpoint=builtin:drafter"],
        "tiny_judge": ["target.model=builtin:adder", "head.drafter=builtin:adder_drafter"],
        "kangaroo_llama3.1_8b": [*EMBEDDED, "export.dtype=float32"],
        "medusa_llama3.1_8b": EMBEDDED,
        "chimera_llama3.1_8b": [*EMBEDDED, "drafter.draft_vocab_size=512"],
        "hidden_transfer_llama3.1_8b": [*EMBEDDED, "drafter.layers=[3, 4, 5]"],
        "layer_skip_llama3.1_8b": EMBEDDED,
        "consistency_llama3.1_8b": EMBEDDED,
        "hamburger_llama3.1_8b": [*EMBEDDED, "drafter.low_entropy=0.3", "drafter.num_layers=1"],
        "lexical_units_llama3.1_8b": [*EMBEDDED, "drafter.look_ahead_token_id=1"],
        "smollm2_layer_skip": [*EMBEDDED, *EMBEDDED_TEXT],
        "llava_1_5_7b_msd": [
            "target.model=builtin:viewer",
            "target.dtype=float32",
            "train.precision=fp32",
            "data.sources=[{kind: squares, images: false}, {kind: squares}]",
            "eval.prompts=builtin:squares",
            "eval.validation_prompts=builtin:squares_validation",
        ],
        "eagle3_llama3.1_8b": [*EMBEDDED, "drafter.draft_vocab_size=512"],
        "eagle3_qwen3_8b": [*EMBEDDED, "drafter.draft_vocab_size=512"],
        "mtp_mimo_7b": [*EMBEDDED, "drafter.init=random", "export.to=[]"],
        "eagle3_1_qwen3_8b": [*EMBEDDED, "drafter.draft_vocab_size=512"],
        "domino_qwen3_8b": [*EMBEDDED, "drafter.mask_token_id=1"],
        "xpress_qwen3_8b": [*EMBEDDED, "drafter.mask_token_id=1"],
        "dflash2_qwen3_8b": [*EMBEDDED, "drafter.mask_token_id=1"],
        "p_eagle_qwen3_8b": [*EMBEDDED, "drafter.draft_vocab_size=512", "drafter.mask_token_id=1"],
        "dflash_qwen3_8b": [*EMBEDDED, "drafter.mask_token_id=1"],
        "smollm2_eagle3": [*EMBEDDED, *EMBEDDED_TEXT, "drafter.draft_vocab_size=512"],
        "smollm2_medusa": [*EMBEDDED, *EMBEDDED_TEXT, "drafter.draft_vocab_size=512"],
        "smollm2_kangaroo": [*EMBEDDED, *EMBEDDED_TEXT, "drafter.draft_vocab_size=512", "export.dtype=float32"],
        "smollm2_draft": [*EMBEDDED, *EMBEDDED_TEXT, "drafter.hidden_size=64", "drafter.num_heads=2"],
    }
    short = ["eval.max_new_tokens=8", "eval.num_prompts=2", "eval.temperatures=[0]"]
    short += ["train.max_steps=4", "train.warmup_steps=2", "train.eval_prompts=2"]
    recipe = load_recipe(name, [*short, *overrides.get(name, [])], smoke=True)
    if recipe.data.generate is not None:
        recipe.data.generate.num_records = 8
    fit(recipe, tmp_path / "run")
    trained = "head" if recipe.head is not None else "drafters/current" if recipe.online is not None else "drafter"
    assert (tmp_path / "run" / trained / "model.safetensors").exists()
