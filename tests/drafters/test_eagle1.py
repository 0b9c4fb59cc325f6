"""EAGLE-1: its folder, its feature regression, its noise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import smooth_l1_loss
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from drafttrain.checkpoint import read_drafter
from drafttrain.drafters.eagle.eagle1 import Eagle1Settings, noise
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer
from tests.drafters.eagle_models import eagle_drafter, eagle_target, packed
from tests.drafters.test_eagle3 import exported

NAMES = {
    "fc.weight",
    "layers.0.post_attention_layernorm.weight",
    *(f"layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
}


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def test_the_exported_folder_has_vllms_names_and_reads_back(target, tmp_path):
    drafter = eagle_drafter("eagle", target)
    folder = exported(drafter, target, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == NAMES  # no head, no input norm, no bias: engines refuse or drop them
    assert tensors["fc.weight"].shape == (32, 64)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 1
    again = read_drafter(folder, target, dtype="float64")
    batch, _ = packed(target, drafter, (9, 6), width=15)
    assert torch.equal(drafter(batch).logits_BTV(1), again(batch).logits_BTV(1))


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "p_eagle"])
def test_layers_read_the_rows_of_the_embedding_that_engines_share_with_them(kind):
    """Without the factor of a target that scales them in its embedding: vLLM and SGLang share the matrix alone."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3TextConfig(vocab_size=257, hidden_size=32, intermediate_size=48, pad_token_id=0, **sizes)
    model = Gemma3ForCausalLM(config).double().eval()
    target = Target(model, byte_tokenizer(), name="tiny", fingerprint="")
    own = {"mask_token_id": 256} if kind == "p_eagle" else {}
    drafter = eagle_drafter(kind, target, **own)
    tokens_BT = torch.randint(1, 257, (2, 5))
    assert torch.equal(drafter.embed(tokens_BT), model.state_dict()["model.embed_tokens.weight"][tokens_BT])
    # The control: what the target itself reads is 32 ** 0.5 times as large.
    assert (model.get_input_embeddings()(tokens_BT) / drafter.embed(tokens_BT)).mean().item() == pytest.approx(32**0.5)


def test_the_number_of_parameters_follows_the_formula(target):
    drafter = eagle_drafter("eagle", target, intermediate_size=48)
    d, q, kv, i = 32, 32, 16, 48
    assert sum(p.numel() for p in drafter.parameters()) == 2 * d * d + d * (q + 2 * kv) + q * d + 3 * d * i + d


def test_the_distribution_is_the_targets_own_head_on_the_predicted_feature(target):
    drafter = eagle_drafter("eagle", target)
    batch, _ = packed(target, drafter, (8,), width=8)
    drafted = drafter(batch)
    head = target.model.get_output_embeddings()
    assert torch.equal(drafted.logits_BTV(1), head(drafted.states_BTD[1]))
    # A perfect prediction has the target's own distribution of the token after the next.
    perfect = drafter.head(batch.target.final_BTD[:, 1:], 1)
    torch.testing.assert_close(perfect, target.model(batch.tokens_BT).logits[:, 1:])


def test_the_regression_is_against_the_feature_of_the_next_token(target):
    drafter = eagle_drafter("eagle", target, num_steps=2, step_decay=0.5, feature_weight=3.0, feature_noise=0.0).train()
    batch, _ = packed(target, drafter, (7, 6), width=13)
    mask_BT = batch.loss_mask_BT.clone()
    mask_BT[0, :4] = False
    batch = replace(batch, loss_mask_BT=mask_BT)
    drafted = drafter(batch)

    def by_hand(ahead: int) -> Any:
        total = torch.zeros((), dtype=torch.float64)
        for depth, factor in ((1, 1.0), (2, 0.5)):
            for t in range(13 - depth - 1):
                if batch.documents_BT[0, t] == batch.documents_BT[0, t + depth + 1] and mask_BT[0, t + depth + 1]:
                    wanted = batch.target.final_BTD[0, t + depth + ahead]
                    total = total + 3 * factor * smooth_l1_loss(drafted.states_BTD[depth][0, t], wanted)
        return total

    torch.testing.assert_close(drafted.extra_loss, by_hand(0))
    assert not torch.isclose(drafted.extra_loss, by_hand(-1))  # the control: the feature that was its input
    assert drafted.depth_weights == {1: 0.1, 2: 0.05}
    assert drafter.eval()(batch).extra_loss is None


def test_noise_depends_on_the_position_and_shrinks_with_the_document(target):
    drafter = eagle_drafter("eagle", target)
    together, places = packed(target, drafter, (6, 12), width=18)
    whole = noise(together, width=64)
    for (row, column), number, length in zip(places, (0, 1), (6, 12), strict=True):
        piece = whole[row, column : column + length]
        alone = replace(
            together,
            tokens_BT=together.tokens_BT[:, :length],
            positions_BT=torch.arange(length)[None],
            documents_BT=torch.full((1, length), number),
        )
        assert torch.equal(noise(alone, width=64)[0], piece)
        bound = 0.5 * 512 / length
        assert 0.97 * bound < piece.abs().max() <= bound
    assert not torch.equal(noise(replace(together, step=1), width=64), whole)


def test_only_training_reads_noise(target):
    drafter = eagle_drafter("eagle", target)
    batch, _ = packed(target, drafter, (8,), width=8)
    quiet = drafter(batch).states_BTD[1]
    assert torch.equal(drafter(batch).states_BTD[1], quiet)
    assert not torch.allclose(drafter.train()(batch).states_BTD[1], quiet)


def test_settings_without_any_loss_are_refused():
    assert "there is no loss left" in Eagle1Settings(feature_weight=0, loss_weight=0).check()[0]
