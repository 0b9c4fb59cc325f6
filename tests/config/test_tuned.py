"""What a recipe that trains the target itself cannot have is refused by key."""

from __future__ import annotations

import pytest

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.device=cpu"], r"train\.device: cpu: drafter\.tune trains the target itself"),
        (
            ["drafter.tune={lora: null}", "train.deepspeed={stage: 3}"],
            r"drafter\.tune\.lora: null trains a whole copy .* stage 0, 1 or 2",
        ),
        (["train.target_placement=sharded"], r"sharded: drafter\.tune: the target's own blocks are trained"),
        (["drafter.mixed_labels=0.2"], r"data\.cache: drafter\.mixed_labels .* set none, got states"),
        (["drafter.tune={lora: {whole_modules: [norm]}}"], r"whole_modules: the target's own weights stay frozen"),
        (
            ["eval.length={kind: tree, num_draft_tokens: 8}"],
            r"tree is a tree, and drafter\.kind consistency drafts chains",
        ),
        (["export.to=[vllm]"], r"export\.to: vllm does not support drafter\.kind consistency"),
        (["train.compile=true"], r"train\.compile: drafter consistency has no part to compile"),
        (["target.model=null", "target.tokenizer=x"], r"drafter: consistency is made from its target"),
    ],
)
def test_what_does_not_go_with_a_tuned_target_is_refused_by_key(overrides: list[str], said: str):
    load_recipe("tiny_consistency", [])
    with pytest.raises(RecipeError, match=said):
        load_recipe("tiny_consistency", overrides)
