"""A model runs with an attention that it supports; messages name the setting of the recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from drafttrain.checkpoint import read_drafter
from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Prompt
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.settings import EvalSettings
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.absent_target import AbsentTarget
from tests.conftest import byte_tokenizer
from tests.eval.decoding import decode, greedy


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a Gemma 2, which transformers runs only with eager attention."""
    folder = tmp_path_factory.mktemp("gemma2")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
        sliding_window=16,
        initializer_range=0.2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(Gemma2ForCausalLM._supports_sdpa, reason="this transformers runs Gemma 2 with sdpa")
@pytest.mark.parametrize("load", [Target.load, AbsentTarget.load], ids=["whole", "absent"])
def test_an_unsupported_attention_is_refused_naming_one_that_works(load: Any, gemma2: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not support attention 'sdpa' here: set target.attention: eager$"):
        load(TargetSettings(model=str(gemma2)))


def test_an_attention_that_is_not_installed_is_refused_in_one_line(tiny_folder: Path) -> None:
    settings = TargetSettings(model=str(tiny_folder), attention="flash_attention_2")
    with pytest.raises(CheckpointError, match=r"does not support attention 'flash_attention_2' here: set .*: sdpa$"):
        Target.load(settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gemma2_drafts_for_a_target_of_any_attention(tiny_folder: Path, gemma2: Path, attention: Any) -> None:
    target = Target.load(TargetSettings(model=str(tiny_folder), attention=attention))
    read = read_drafter(gemma2, target)
    settings = CausalLMSettings(init="checkpoint", checkpoint=str(gemma2))
    started = CausalLMDrafter.create(settings, target=target, tokenizer=target.tokenizer)
    prompts = [Prompt("a", [1, 2, 3])]
    for drafter in (read, started):
        assert drafter.model.config._attn_implementation == "eager"  # type: ignore[union-attr]
        (found,) = decode(target, drafter.eval().proposer(target), prompts=prompts, new=8, stop_tokens=())
        assert list(found.tokens) == greedy(target, prompts[0], 8)


def test_a_drafter_takes_eager_attention_from_its_target(tiny_folder: Path) -> None:
    for attention, taken in (("sdpa", "sdpa"), ("eager", "eager")):
        target = Target.load(TargetSettings(model=str(tiny_folder), attention=attention))
        assert read_drafter(tiny_folder, target).model.config._attn_implementation == taken  # type: ignore[union-attr]


@pytest.mark.long
def test_the_gemma2_pair_of_the_cases_decodes_exactly(shared_folder: Path) -> None:
    folder = shared_folder / "cases/checkpoints"
    target = Target.load(TargetSettings(model=str(folder / "target_gemma2"), attention="eager"))
    prompts = [Prompt(str(i), [5 + i, 6, 7, *range(9, 9 + i)]) for i in range(2)]
    settings = EvalSettings(max_new_tokens=48, temperatures=[0.0], speed_prompts=0, resamples=100, batch_size=2)
    result = evaluate({"drafter": folder / "gemma2_draft"}, target, prompts, settings)
    assert result.temperatures[0].drafters["drafter"].parity.exact
