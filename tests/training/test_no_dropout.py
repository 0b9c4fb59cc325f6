"""A drafter in training computes what it computes when it drafts, whatever dropout its configuration asks for."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from drafttrain.drafters.causal_lm.cut import cut_from
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer
from tests.training.layouts import BATCH, of_step

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.3),
    "bloom": transformers.BloomConfig(
        vocab_size=257, hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.3, attention_dropout=0.3
    ),
    "seed_oss": transformers.SeedOssConfig(
        **SIZES, intermediate_size=64, head_dim=16, num_key_value_heads=1, residual_dropout=0.3, attention_dropout=0.3
    ),
    "mixtral": transformers.MixtralConfig(
        **SIZES, intermediate_size=64, num_key_value_heads=1, num_local_experts=2, router_jitter_noise=0.5
    ),
}


def run(
    folder: Path,
    name: str,
    *,
    layers: int,
    records_per_device: int | None = None,
    steps: int = 3,
    lr: float = 1e-3,
    again: bool = False,
) -> Any:
    """Train a drafter that was cut out of its target; return the rows of metrics.csv, and the drafter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    target = Target(model, byte_tokenizer(), name=name, fingerprint="")
    drafter = CausalLMDrafter(cut_from(model, range(layers), width=None))
    wanted = TrainSettings(
        max_steps=steps,
        batch_size=BATCH,
        records_per_device=records_per_device,
        lr=lr,
        warmup_steps=0,
        schedule="constant",
        loggers=["csv"],
        eval_every_steps=0,
        log_every_steps=1,
        checkpoint_every_steps=2,
        activation_checkpointing=again,
    )
    train(
        drafter,
        losses.build(losses.entry("forward_kl").settings()),
        target=target,
        of_step=partial(of_step, records_per_device=records_per_device),
        estimate=None,
        settings=wanted,
        vocab_size=257,
        folder=folder,
    )
    return list(csv.DictReader((folder / "metrics.csv").open())), drafter


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", MODELS)
def test_a_drafter_of_all_layers_of_its_target_is_accepted_always(tmp_path: Path, name: str, again: bool) -> None:
    # Where nothing is to be learned, Adam makes steps of rounding.
    rows, _ = run(tmp_path, name, layers=2, lr=1e-9, again=again)
    assert [float(row["loss"]) for row in rows] == pytest.approx([0, 0, 0], abs=1e-5)
    assert [float(row["acceptance_rate"]) for row in rows] == pytest.approx([1, 1, 1], abs=1e-4)


def test_resume_and_accumulation_change_no_number_of_a_model_with_dropout(tmp_path: Path) -> None:
    whole, drafter = run(tmp_path / "whole", "gpt2", layers=1, steps=4)
    assert float(whole[0]["loss"]) > 0.01
    run(tmp_path / "resumed", "gpt2", layers=1, steps=2)
    resumed, again = run(tmp_path / "resumed", "gpt2", layers=1, steps=4)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    for name, value in drafter.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    pieces, _ = run(tmp_path / "pieces", "gpt2", layers=1, steps=4, records_per_device=2)
    assert [float(r["loss"]) for r in pieces] == pytest.approx([float(r["loss"]) for r in whole], rel=1e-5)
