"""A mixture of experts becomes a dense drafter: exact where routing does not matter, and another function where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Record
from drafttrain.drafters.causal_lm.cut_settings import CutSettings
from drafttrain.drafters.causal_lm.dense import dense_config, dense_from, is_sparse, routing_shares
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.loading import load_causal_lm
from tests.conftest import byte_tokenizer, random_llama

SIZES: dict[str, Any] = {
    **{"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 16},
    **{"num_key_value_heads": 1, "intermediate_size": 40, "initializer_range": 0.2, "num_experts_per_tok": 2},
    **{"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
}
EXPERTS = 4
CONFIGS: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS),
    # Its first layer is dense, and wider than an expert.
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=EXPERTS, moe_intermediate_size=24, mlp_only_layers=[0], norm_topk_prob=True
    ),
}
DENSE = {"mixtral": "MistralForCausalLM", "qwen3_moe": "Qwen3ForCausalLM"}
TOKENS = torch.randint(1, 257, (1, 19), generator=torch.Generator().manual_seed(1))


def mixture(name: str, *, same: bool = False, constant: bool = False, **changed: Any) -> Any:
    """Return a random mixture; `same`: all experts of a layer are; `constant`: all gates of all tokens are equal."""
    torch.manual_seed(0)
    fields = CONFIGS[name].to_dict() | changed
    model = AutoModelForCausalLM.from_config(type(CONFIGS[name])(**fields)).eval()
    with torch.no_grad():
        for mlp in (block.mlp for block in blocks(model) if is_sparse(block)):
            if same:
                for weights in (mlp.experts.gate_up_proj, mlp.experts.down_proj):
                    weights.copy_(weights[:1].expand_as(weights))
            if constant:
                mlp.gate.weight.zero_()
    return model


def target_of(model: Any) -> Target:
    return Target(model, byte_tokenizer(), name="mixture", fingerprint="")


def records(count: int = 3) -> list[Record]:
    draws = torch.Generator().manual_seed(2)
    texts = [torch.randint(1, 257, (12 + i,), generator=draws).tolist() for i in range(count)]
    return [Record(str(i), text, [True] * len(text)) for i, text in enumerate(texts)]


def dense(model: Any, experts: int, join: Any) -> Any:
    shares = routing_shares(target_of(model), records())
    return dense_from(model, CutSettings(experts=experts, join=join, shares=shares))


@torch.no_grad()
def distance(one: Any, other: Any) -> float:
    wanted = one(TOKENS).logits
    return float((other(TOKENS).logits - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("join", ["side_by_side", "averaged"])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_of_identical_experts_gives_a_dense_model_with_its_logits(name: str, experts: int, join: str) -> None:
    model = mixture(name, same=True)
    made = dense(model, experts, join)
    assert type(made).__name__ == DENSE[name]
    assert distance(model, made) < 1e-5
    # The control: experts that differ.
    others = mixture(name)
    assert distance(others, dense(others, experts, join)) > 0.02


@pytest.mark.parametrize("name", CONFIGS)
def test_side_by_side_is_the_mixture_itself_where_gates_are_constant_and_none_is_left_out(name: str) -> None:
    model = mixture(name, constant=True, num_experts_per_tok=EXPERTS)
    assert distance(model, dense(model, EXPERTS, "side_by_side")) < 1e-5
    # The controls: an expert left out, and the mean of weights instead of outputs.
    assert distance(model, dense(model, EXPERTS - 1, "side_by_side")) > 0.01
    assert distance(model, dense(model, EXPERTS, "averaged")) > 0.01


def test_gates_that_do_not_add_up_to_1_keep_their_sum() -> None:
    model = mixture("qwen3_moe", same=True, constant=True, norm_topk_prob=False)
    # Two of four equal gates, each 1/4: the experts' output counts half.
    shares = routing_shares(target_of(model), records())
    assert sum(shares[1]) == pytest.approx(0.5)
    assert distance(model, dense(model, 1, "averaged")) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_shares_are_the_mean_gates_of_the_texts(name: str) -> None:
    model, texts = mixture(name), records()
    shares = routing_shares(target_of(model), texts)
    sparse = [is_sparse(block) for block in blocks(model)]
    assert [len(own) for own in shares] == [EXPERTS if one else 0 for one in sparse]
    assert all(sum(own) == pytest.approx(1, abs=1e-5) for own in shares if own)
    number = sparse.index(True)
    entering, totals = [], torch.zeros(EXPERTS)
    handle = blocks(model)[number].mlp.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0][0]))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text.tokens]))
    handle.remove()
    for state_TD in entering:
        chances_TE = torch.softmax(state_TD @ blocks(model)[number].mlp.gate.weight.T, dim=-1)
        for chances_E in chances_TE:
            best = chances_E.topk(2)
            totals[best.indices] += (best.values / best.values.sum()).detach()
    count = sum(len(text.tokens) for text in texts)
    torch.testing.assert_close(torch.tensor(shares[number]), totals / count, rtol=1e-4, atol=1e-5)


def test_the_experts_with_the_largest_share_are_taken() -> None:
    model = mixture("mixtral")
    shares = [[0.1, 0.6, 0.2, 0.1]] * 3
    made = dense_from(model, CutSettings(experts=1, shares=shares))
    experts, mlp = blocks(model)[2].mlp.experts, blocks(made)[2].mlp
    gate, up = experts.gate_up_proj[1].chunk(2)
    for found, wanted in ((mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, experts.down_proj[1])):
        torch.testing.assert_close(found.weight, wanted)
    two = blocks(dense_from(model, CutSettings(experts=2, shares=shares)))[0].mlp.down_proj.weight
    kept = blocks(model)[0].mlp.experts.down_proj
    torch.testing.assert_close(two, torch.cat([0.75 * kept[1], 0.25 * kept[2]], dim=1))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_drafter_starts_from_some_dense_layers_and_its_folder_is_a_plain_model(name: str, tmp_path: Path) -> None:
    target = target_of(mixture(name, same=True))
    settings = CausalLMSettings(init="target", num_layers=2, cut=CutSettings(experts=2, layers=[0, 2]))
    choice = CausalLMDrafter.start_choice(settings)
    assert choice is not None
    chosen = choice.settings(choice.choose(target, records()))
    drafter = CausalLMDrafter.create(chosen, target=target, tokenizer=target.tokenizer)
    with torch.no_grad():
        target.model.model.layers = torch.nn.ModuleList([blocks(target.model)[i] for i in (0, 2)])
        assert distance(target.model, drafter.model) < 1e-5
    drafter.save(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert type(loaded).__name__ == DENSE[name]
    assert distance(drafter.model, loaded) < 1e-6


def test_a_plan_reads_sizes_only() -> None:
    for join, width in (("side_by_side", 72), ("averaged", 40)):
        cut = CutSettings(experts=3, join=join)  # type: ignore[arg-type]
        assert dense_config(mixture("qwen3_moe"), cut).intermediate_size == width, "the dense layer has 40 neurons"


def test_what_cannot_be_made_dense_is_refused() -> None:
    cases: list[tuple[Any, CutSettings, str]] = [
        (
            random_llama(),
            CutSettings(experts=1, shares=[]),
            "must be a mixture of experts of type mixtral or qwen3_moe",
        ),
        (mixture("mixtral"), CutSettings(experts=9, shares=[]), r"experts must be 1\.\.4 for this target, got 9"),
        (
            mixture("mixtral"),
            CutSettings(experts=1, shares=[[1.0] * 4]),
            "one list for each of 3 layers is needed, got 1",
        ),
        (mixture("mixtral"), CutSettings(experts=1, shares=[[1.0]] * 3), "layer 0 has 4 experts, got 1 shares"),
        (mixture("mixtral"), CutSettings(experts=1, shares=[[0.0] * 4] * 3), "layer 0 has no share above 0"),
    ]
    for model, cut, message in cases:
        with pytest.raises(CheckpointError, match=message):
            dense_from(model, cut)
    quantized = mixture("mixtral")
    quantized.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(
        CheckpointError, match=r"drafter\.cut\.experts: the weights are quantized \(fp8\): give the model from before"
    ):
        dense_from(quantized, CutSettings(experts=1, shares=[[1.0] * 4] * 3))
    # All of its layers read a window; those of a dense Qwen3 only from some layer on.
    window = mixture("qwen3_moe", use_sliding_window=True, sliding_window=64)
    shares = routing_shares(target_of(window), records())
    with pytest.raises(CheckpointError, match="sliding_window"):
        dense_from(window, CutSettings(experts=1, shares=shares))
    assert CutSettings(join="averaged", shares=[[1.0]]).check() == [
        "join: is not used without experts",
        "shares: is not used without experts",
    ]
