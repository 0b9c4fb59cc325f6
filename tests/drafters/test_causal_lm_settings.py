"""Starts of the independent drafter: from scratch, from a checkpoint, cut out of the target."""

from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.causal_lm import CausalLMDrafter, CausalLMSettings, cut_from, spread
from drafttrain.target import Target, TargetSettings
from tests.conftest import random_llama


def test_cutting_all_layers_at_full_width_is_the_target_itself() -> None:
    model = random_llama(num_layers=3)
    copy = cut_from(model, num_layers=3, width=64)
    tokens = torch.randint(257, (1, 11))
    torch.testing.assert_close(copy(tokens).logits, model(tokens).logits)
    assert all(parameter.requires_grad for parameter in copy.parameters())


def test_a_cut_keeps_spread_layers_and_the_strongest_neurons() -> None:
    assert spread(6, 3) == [0, 2, 5]
    assert spread(4, 1) == [0]
    model = random_llama(num_layers=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 10:] = 0  # only the first ten neurons do anything
    small = cut_from(model, num_layers=2, width=10)
    assert small.config.num_hidden_layers == 2
    assert small.config.intermediate_size == 10
    x = torch.randn(4, 32)
    torch.testing.assert_close(small.model.layers[0].mlp(x), model.model.layers[0].mlp(x))
    torch.testing.assert_close(small.model.layers[1].mlp(x), model.model.layers[2].mlp(x))


def test_the_cut_is_what_a_loader_of_its_folder_builds(tiny_target: Target, tmp_path: Path) -> None:
    settings = CausalLMSettings(init="target", num_layers=1, intermediate_size=16)
    drafter = CausalLMDrafter.create(settings, target=tiny_target, tokenizer=tiny_target.tokenizer)
    drafter.save(tmp_path)
    tiny_target.tokenizer.save_pretrained(tmp_path)
    again = CausalLMDrafter.load(tmp_path, tiny_target)
    tokens = torch.randint(257, (2, 7))
    torch.testing.assert_close(again.model(tokens).logits, drafter.model(tokens).logits)


@pytest.mark.parametrize(("layers", "width", "message"), [(5, None, "must be 1..2"), (1, 65, "must be 1..64")])
def test_a_cut_that_does_not_fit_is_refused(tiny_target: Target, layers: int, width: int | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        cut_from(tiny_target.model, num_layers=layers, width=width)


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
