"""Starts of the independent drafter: from scratch, from a checkpoint."""

from pathlib import Path

import pytest

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.causal_lm import CausalLMDrafter, CausalLMSettings
from drafttrain.target import Target, TargetSettings


def test_scratch_has_the_parameters_that_its_sizes_give(tiny_target: Target) -> None:
    settings = CausalLMSettings(hidden_size=32, num_layers=2, num_heads=1, intermediate_size=80)
    drafter = CausalLMDrafter.create(settings, target=tiny_target, tokenizer=tiny_target.tokenizer)
    layer = 4 * 32 * 32 + 3 * 32 * 80 + 2 * 32
    assert sum(p.numel() for p in drafter.parameters()) == 257 * 32 + 2 * layer + 32


def test_a_checkpoint_with_another_tokenizer_is_refused(tiny_target: Target, save_llama, tmp_path: Path) -> None:
    folder = save_llama(seed=4, num_layers=1)
    settings = CausalLMSettings(init="checkpoint", checkpoint=str(folder))
    CausalLMDrafter.create(settings, target=tiny_target, tokenizer=tiny_target.tokenizer)
    tokenizer = Target.load(TargetSettings(model=str(folder))).tokenizer
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="'<x>'"):
        CausalLMDrafter.create(settings, target=tiny_target, tokenizer=tiny_target.tokenizer)


def test_settings_problems_are_all_named() -> None:
    problems = CausalLMSettings(init="checkpoint", num_heads=3, num_kv_heads=2).check()
    assert len(problems) == 2
