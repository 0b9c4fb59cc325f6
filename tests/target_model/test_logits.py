"""Logits computed from the final state equal the model's own, or the model is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Sampling
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import MedusaSettings
from drafttrain.eval.replay import Text, replay_rows
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.absent_target import AbsentTarget
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.logits import check_logits, head_logits
from tests.conftest import byte_tokenizer, random_llama

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.5}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "granite": transformers.GraniteConfig(**LLAMA, logits_scaling=4.0),
    "granitemoe": transformers.GraniteMoeConfig(**LLAMA, **EXPERTS, logits_scaling=4.0),
    "hyperclovax": transformers.HyperCLOVAXConfig(**LLAMA, logits_scaling=4.0),
    "cohere": transformers.CohereConfig(**LLAMA, logit_scale=0.25),
    "cohere2": transformers.Cohere2Config(**LLAMA, logit_scale=0.25),
    "gemma2": transformers.Gemma2Config(**LLAMA, final_logit_softcapping=3.0),
    "gemma3": transformers.Gemma3TextConfig(**LLAMA, final_logit_softcapping=3.0),
    "nanochat": transformers.NanoChatConfig(**LLAMA, final_logit_softcapping=3.0),
    "minicpm3": transformers.MiniCPM3Config(**LLAMA | {"num_key_value_heads": 2}, dim_model_base=8),
    "gpt2": transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "gptj": transformers.GPTJConfig(vocab_size=257, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16),
    "llama4": transformers.Llama4TextConfig(**LLAMA, intermediate_size_mlp=48, **EXPERTS),
    "opt-350m": transformers.OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, _remove_final_layer_norm=True
    ),
    "mpt": transformers.MptConfig(vocab_size=257, d_model=32, n_layers=2, n_heads=2),
    "phi": transformers.PhiConfig(**SIZES, intermediate_size=48, partial_rotary_factor=0.5),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).eval()
    with torch.no_grad():
        # Logits far from zero, so that a cap shows.
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def target_of(model: Any) -> Target:
    return Target(model, byte_tokenizer(), name="tiny", fingerprint="")


@pytest.mark.parametrize("name", MODELS)
def test_training_and_decoding_have_the_same_logits(name: str) -> None:
    model = model_of(name)
    tokens_BT = torch.randint(1, 257, (2, 9))
    target, positions_BT = target_of(model), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        own_BTV = model(tokens_BT).logits
    seen = target.read(tokens_BT, positions_BT, TargetNeeds(logits=True, final=True))
    assert seen.logits_BTV is not None
    torch.testing.assert_close(seen.logits_BTV, own_BTV, rtol=1e-5, atol=1e-5)
    (tapped,) = CachedLM(model, name="target").begin([tokens_BT[0].tolist()], needs=TargetNeeds(final=True))
    assert seen.final_BTD is not None
    torch.testing.assert_close(tapped.final_BTD, seen.final_BTD[:1], rtol=1e-5, atol=1e-5)
    rows_NV = target.rows_of(seen).at(torch.arange(18))
    torch.testing.assert_close(rows_NV, own_BTV.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hyperclovax", "granite", "cohere", "gemma2"])
def test_heads_equal_to_the_targets_own_are_always_accepted(name: str) -> None:
    target = target_of(model_of(name))
    medusa = Medusa.create(MedusaSettings(num_heads=1), target=target, tokenizer=target.tokenizer)
    tokens_BT = torch.randint(1, 257, (1, 9))
    seen = target.read(tokens_BT, torch.arange(9)[None], TargetNeeds(final=True, logits=True))
    assert seen.final_BTD is not None
    torch.testing.assert_close(medusa.head(medusa.states(seen.final_BTD, 1), 1), seen.logits_BTV)


class Bent(transformers.LlamaForCausalLM):
    """A model that computes its logits in an unknown way."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output


def test_logits_computed_in_an_unknown_way_are_refused_by_name() -> None:
    target = target_of(Bent(random_llama().config))
    text = Text("a", [1, 2], [3, 4])
    drafter = Medusa.create(MedusaSettings(num_heads=1), target=target, tokenizer=target.tokenizer)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"Bent computes its logits .* differ by 33\.3% of the largest one"):
            replay_rows(target, drafter, [text], Sampling())
    with pytest.raises(CheckpointError, match="Bent computes its logits"):
        target.read(torch.ones(1, 4, dtype=torch.long), torch.arange(4)[None], TargetNeeds(final=True))


@pytest.mark.parametrize(
    "config",
    [
        transformers.ModernBertDecoderConfig(**SIZES, intermediate_size=48),
        transformers.ElectraConfig(**SIZES, is_decoder=True, embedding_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_a_layer_between_the_final_state_and_the_output_matrix_is_refused(config: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError, match=rf"{type(model).__name__} computes its logits"):
        target_of(model).read(torch.ones(1, 4, dtype=torch.long), torch.arange(4)[None], TargetNeeds(final=True))


@pytest.mark.parametrize("name", ["gpt2", "opt", "granitemoe", "hyperclovax"])
def test_a_target_without_its_blocks_is_compared_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of(name).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    absent = AbsentTarget.load(TargetSettings(model=str(tmp_path)))
    states_ND = torch.randn(3, absent.model.get_output_embeddings().weight.shape[1])
    whole = Target.load(TargetSettings(model=str(tmp_path)))
    torch.testing.assert_close(head_logits(absent.model, states_ND), head_logits(whole.model, states_ND))
    monkeypatch.setattr("drafttrain.target_model.logits.MULTIPLIED_BY", ("hidden_size",))
    with pytest.raises(CheckpointError, match="in an unknown way"):
        AbsentTarget.load(TargetSettings(model=str(tmp_path)))


def test_a_model_is_compared_once_and_stays_as_it_was() -> None:
    model = random_llama().train()
    calls: list[nn.Module] = []
    model.register_forward_hook(lambda module, *_: calls.append(module))
    check_logits(model)
    check_logits(model)
    assert calls == [model]
    assert all(module.training for module in model.modules())
