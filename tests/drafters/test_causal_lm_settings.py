"""How the independent drafter starts: from scratch or from a checkpoint."""

from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.target_model import Target, TargetSettings


def test_scratch_has_the_number_of_parameters_of_its_sizes(tiny_target: Target) -> None:
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


def test_a_drafter_without_a_target_has_a_row_for_every_id_of_a_tokenizer_with_holes() -> None:
    tokenizer = tokenizer_with_holes()
    settings = CausalLMSettings(hidden_size=32, num_layers=1, num_heads=1)
    drafter = CausalLMDrafter.create(settings, target=None, tokenizer=tokenizer)
    last = tokenizer("z")["input_ids"]
    assert last == [300]
    assert drafter.model(torch.tensor([last])).logits.shape[-1] == 301


def tokenizer_with_holes() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters whose ids start at 0 and continue at 276."""
    vocabulary = {"<|end|>": 0} | {letter: 275 + number for number, letter in enumerate(ascii_lowercase)}
    model = models.BPE(vocab=vocabulary, merges=[])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<|end|>", pad_token="<|end|>")
