"""How the independent drafter starts: from scratch or from a checkpoint."""

from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.drafters.causal_lm.projected import projected
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.loading import load_causal_lm


def test_scratch_has_the_number_of_parameters_of_its_sizes(tiny_target: Target) -> None:
    settings = CausalLMSettings(hidden_size=32, num_layers=2, num_heads=1, intermediate_size=80)
    drafter = CausalLMDrafter.create(settings, target=tiny_target, tokenizer=tiny_target.tokenizer)
    layer = 4 * 32 * 32 + 3 * 32 * 80 + 2 * 32
    assert sum(p.numel() for p in drafter.parameters()) == 257 * 32 + 2 * layer + 32


def products(rows_VD: torch.Tensor) -> torch.Tensor:
    return rows_VD @ rows_VD.T


def test_a_projected_embedding_is_the_nearest_of_its_width(tiny_target: Target) -> None:
    rows_VD = tiny_target.model.get_output_embeddings().weight.detach()
    found_VW = projected(rows_VD, 8)
    left, strength, _ = torch.linalg.svd(rows_VD, full_matrices=False)
    torch.testing.assert_close(products(found_VW), products(left[:, :8] * strength[:8]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(products(projected(rows_VD, 32)), products(rows_VD), atol=1e-5, rtol=1e-4)
    assert (found_VW.norm(dim=0).diff() <= 1e-5).all()
    # The control: the first coordinates of the rows are further from them.
    assert (products(rows_VD[:, :8]) - products(rows_VD)).norm() > (products(found_VW) - products(rows_VD)).norm()
    with pytest.raises(CheckpointError, match=r"drafter\.hidden_size must be 1\.\.32"):
        projected(rows_VD, 64)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_drafter_starts_from_the_targets_rows_and_keeps_them_if_they_are_frozen(
    tiny_target: Target, tmp_path: Path, frozen: bool
) -> None:
    settings = CausalLMSettings(
        hidden_size=16, num_layers=1, num_heads=1, embedding_init="target", freeze_embedding=frozen
    )
    drafter = CausalLMDrafter.create(settings, target=tiny_target, tokenizer=tiny_target.tokenizer)
    wanted = projected(tiny_target.model.get_output_embeddings().weight, 16)
    assert torch.equal(drafter.model.get_output_embeddings().weight, wanted)
    optimizer = torch.optim.SGD([p for p in drafter.parameters() if p.requires_grad], lr=1.0)
    drafter.model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    assert torch.equal(drafter.model.get_input_embeddings().weight, wanted) == frozen
    drafter.save(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, drafter.model.get_input_embeddings().weight)


def test_a_projected_embedding_needs_a_target_and_a_start_from_scratch(tiny_target: Target) -> None:
    settings = CausalLMSettings(embedding_init="target")
    with pytest.raises(CheckpointError, match=r"embedding_init is 'target' but target\.model is null"):
        CausalLMDrafter.create(settings, target=None, tokenizer=tiny_target.tokenizer)
    assert CausalLMSettings(init="target", embedding_init="target").check() == [
        "embedding_init: is not used with init 'target', which has an embedding of its own"
    ]


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
