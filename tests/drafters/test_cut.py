"""A drafter cut from its target computes what the chosen blocks compute in the target."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.causal_lm.cut import cut_from, without_blocks
from drafttrain.drafters.causal_lm.cut_settings import CutSettings, spread
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.loading import load_causal_lm
from tests.conftest import byte_tokenizer, random_llama

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
MODELS: dict[str, Any] = {
    "smollm3": transformers.SmolLM3Config(**LLAMA, no_rope_layers=[1, 0, 1, 0]),
    "gemma2": transformers.Gemma2Config(**LLAMA, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(
        **LLAMA, sliding_window=8, layer_types=["sliding_attention"] * 3 + ["full_attention"]
    ),
    "exaone4": transformers.Exaone4Config(**LLAMA, sliding_window=8, sliding_window_pattern=2),
    "cohere2": transformers.Cohere2Config(**LLAMA, sliding_window=8),
    "llama4": transformers.Llama4TextConfig(
        **LLAMA,
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        moe_layers=[1, 3],
        no_rope_layers=[1, 1, 0, 0],
    ),
    "qwen2": transformers.Qwen2Config(
        **{name: value for name, value in LLAMA.items() if name != "head_dim"},
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**LLAMA, **EXPERTS, mlp_only_layers=[0, 3]),
    "glm4_moe": transformers.Glm4MoeConfig(
        **LLAMA, moe_intermediate_size=24, n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=2
    ),
    "granite_swa": transformers.GraniteSWAConfig(**LLAMA, sliding_window=8, layer_rope_theta=[1e4, 10.0, 1e4, 100.0]),
    "gpt2": transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=2, n_positions=64),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=4,
        num_heads=2,
        attention_types=[[["global", "local"], 2]],
        window_size=8,
    ),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=4, n_head=2),
}


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0], [0, 2, 3]])
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_drafter_is_the_target_with_its_other_blocks_skipped(
    name: str, layers: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    cut_from(model, layers, width=None).save_pretrained(tmp_path)
    tokens = torch.randint(1, 61, (1, 40))
    for index, block in enumerate(blocks(model)):
        if index not in layers:
            # Such a block then adds 0 to the stream.
            for parameter in block.parameters():
                parameter.zero_()
    found = load_causal_lm(tmp_path, attention=model.config._attn_implementation)(tokens).logits
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.DiffLlamaConfig(
                **{k: v for k, v in LLAMA.items() if k != "head_dim"} | {"num_key_value_heads": 2}
            ),
            r"block 3 has self_attn\.lambda_init 0\.5\d*, at position 1 it has 0\.3",
        ),
        (
            transformers.GPT2Config(
                vocab_size=61, n_embd=32, n_layer=4, n_head=2, scale_attn_by_inverse_layer_idx=True
            ),
            r"its logits differ by \d+\.\d% of the largest logit",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_blocks_that_depend_on_their_position_are_refused_in_one_line(config: Any, message: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    with pytest.raises(
        CheckpointError, match=f"blocks 0, 3 of .* do not work as a model of their own: .*{message}"
    ) as caught:
        cut_from(model, [0, 3], width=None)
    assert "\n" not in str(caught.value)


def test_cutting_all_layers_at_full_width_is_the_target_itself() -> None:
    model = random_llama(num_layers=3)
    copy = cut_from(model, range(3), width=64)
    tokens = torch.randint(257, (1, 11))
    torch.testing.assert_close(copy(tokens).logits, model(tokens).logits)
    assert all(parameter.requires_grad for parameter in copy.parameters())


def test_a_cut_keeps_evenly_spaced_layers_and_the_strongest_neurons() -> None:
    assert spread(6, 3) == [0, 2, 5]
    assert spread(4, 1) == [0]
    model = random_llama(num_layers=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 10:] = 0  # only the first ten neurons do anything
    small = cut_from(model, [0, 2], width=10)
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


def test_a_cut_that_does_not_fit_is_refused(tiny_target: Target) -> None:
    with pytest.raises(CheckpointError, match=r"num_layers must be 1\.\.2"):
        CutSettings().layer_numbers(2, 5)
    with pytest.raises(CheckpointError, match=r"cut\.layers must be of 0\.\.1 for this target, got 3"):
        CutSettings(layers=[0, 3]).layer_numbers(2, 2)
    with pytest.raises(CheckpointError, match=r"must be 1\.\.64"):
        cut_from(tiny_target.model, [0], width=65)
    assert CutSettings(layers=[2, 1]).check() == ["layers: at least one number, ascending, each once, got [2, 1]"]
    assert CausalLMSettings(init="target", cut=CutSettings(layers=[0, 1, 3])).check() == [
        "cut.layers: 3 layers are listed, and num_layers is 2: give as many"
    ]
    assert CausalLMSettings(cut=CutSettings(layers="last")).check() == [
        "cut: is not used with init 'scratch'; set init: target"
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "kept"), [("spread", [0, 4]), ("first", [0, 1]), ("last", [3, 4]), ([1, 3], [1, 3])]
)
def test_a_drafter_starts_from_the_layers_that_are_named(layers: Any, kept: list[int], tmp_path: Path) -> None:
    target = Target(random_llama(num_layers=5), byte_tokenizer(), name="tiny", fingerprint="")
    settings = CausalLMSettings(init="target", num_layers=2, cut=CutSettings(layers=layers))
    drafter = CausalLMDrafter.create(settings, target=target, tokenizer=target.tokenizer)
    tokens = torch.randint(257, (1, 11))
    with without_blocks(target.model, [block for block in range(5) if block not in kept]):
        wanted = target.model(tokens).logits
    torch.testing.assert_close(drafter.model(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    # The control: the layers after them, in a circle.
    with without_blocks(target.model, [block for block in range(5) if (block - 1) % 5 not in kept]):
        others = target.model(tokens).logits
    assert (others - wanted).norm() > 0.1 * wanted.norm()
