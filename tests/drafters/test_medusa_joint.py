"""Medusa-2: adapters that can be removed exactly, a KL that preserves the target's distribution, files that peft loads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from drafttrain.checkpoint import About, write_about
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.texts import Prompt, Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.adapter_folder import merged
from drafttrain.drafters.lora import LoraAdapter, LoraSettings, LowRank, linears_in
from drafttrain.drafters.medusa.module import Medusa
from drafttrain.drafters.medusa.settings import JointSettings, MedusaSettings
from drafttrain.drafters.tuned_target import ADAPTER
from drafttrain.eval.evaluate import evaluate
from drafttrain.eval.settings import EvalSettings
from drafttrain.losses.align import align
from drafttrain.losses.ce import CrossEntropy, CrossEntropySettings
from drafttrain.losses.random_rows import chosen
from drafttrain.losses.step import drafted_loss
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.documents import separates_documents
from drafttrain.training.optimizer import build_optimizer
from drafttrain.training.settings import TrainSettings
from tests.conftest import byte_tokenizer, random_llama
from tests.drafters.test_medusa import D, V, batch_of, texts_of

LORA = LoraSettings(rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj", "down_proj"])
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


def create(target: Target, **joint: Any) -> Medusa:
    settings = MedusaSettings(num_heads=2, joint=JointSettings(lora=LORA, **joint))
    return Medusa.create(settings, target=target, tokenizer=target.tokenizer).to(target.model.dtype)


def read(target: Target, medusa: Medusa, *, seed: int = 1) -> DraftBatch:
    batch = batch_of(texts_of(target, 8, seed=seed, new=12))
    return replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, medusa.needs()))


def targets_loss(drafted: DraftOutput, batch: DraftBatch) -> float:
    """Return the loss that is trained next to the heads."""
    (beside,) = drafted.beside
    batch = replace(batch, target_rows=beside.target_rows)
    rows = align(beside.drafted, batch)
    return float(drafted_loss(beside.loss, beside.drafted, rows, batch, vocab_size=V).total.detach())


def train(medusa: Medusa, batch: DraftBatch, *, steps: int) -> None:
    optimizer = torch.optim.Adam(medusa.parameters(), lr=1e-2)
    for step in range(steps):
        drafted = medusa(replace(batch, step=step))
        loss = CrossEntropy(CrossEntropySettings())
        assert drafted.beside
        optimizer.zero_grad()
        made = drafted_loss(loss, drafted, align(drafted, batch), batch, vocab_size=V)
        (made.total / batch.weight_of_step).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(tiny_folder), dtype="float64"))


@pytest.fixture(scope="module")
def trained(target: Target) -> Medusa:
    torch.manual_seed(0)
    medusa = create(target, head_coefficient=1.0)
    train(medusa, read(target, medusa), steps=8)
    return medusa.eval()


def test_without_adapters_the_target_is_the_base_bit_for_bit(target: Target):
    before, digest = target.model(TOKENS).logits, target.weights_digest()
    medusa = create(target)
    train(medusa, read(target, medusa), steps=3)
    assert medusa.adapter is not None
    with medusa.adapter.applied(target.model):
        assert not torch.equal(target.model(TOKENS).logits, before)
    assert torch.equal(target.model(TOKENS).logits, before)
    assert target.weights_digest() == digest
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_the_start_is_the_base_and_writes_no_adapter(target: Target, tmp_path: Path):
    medusa = create(target)
    batch = read(target, medusa)
    drafted = medusa(batch)
    assert batch.target is not None
    assert torch.equal(drafted.states_BTD[1], batch.target.final_BTD)
    assert targets_loss(drafted, batch) == pytest.approx(0, abs=1e-9)
    medusa.save(tmp_path)
    assert not (tmp_path / ADAPTER).exists()
    assert Medusa.load(tmp_path, target).adapted(target) is target


def test_the_targets_loss_is_the_kl_of_base_and_adapted_over_trained_positions(target: Target, trained: Medusa):
    batch = read(target, trained, seed=4)
    assert trained.adapter is not None
    with torch.no_grad():
        base = target.model(batch.tokens_BT).logits.log_softmax(-1)
        with trained.adapter.applied(target.model):
            own = target.model(batch.tokens_BT).logits.log_softmax(-1)
        kl_BT = (base.exp() * (base - own)).sum(-1)
        wanted = float(kl_BT[:, :-1][batch.loss_mask_BT[:, 1:]].sum())
        trained.train()
        found = targets_loss(trained(batch), batch)
        trained.eval()
    assert wanted > 1e-3
    assert found == pytest.approx(wanted, rel=1e-5)


def test_gradients_reach_heads_and_adapters_and_nothing_of_the_target(target: Target):
    medusa = create(target)
    train(medusa, read(target, medusa), steps=2)
    assert all(p.grad is not None and bool(p.grad.any()) for p in medusa.parameters())
    assert all(p.grad is None for p in target.model.parameters())


def test_the_heads_coefficient_rises_as_a_sine_to_its_value(target: Target):
    joint = JointSettings(head_coefficient=0.5, head_warmup_steps=100)
    assert joint.coefficient(0) == 0
    assert joint.coefficient(50) == pytest.approx(0.5 * math.sin(math.pi / 4))
    assert joint.coefficient(100) == joint.coefficient(1000) == 0.5
    assert JointSettings(head_coefficient=0.5).coefficient(0) == 0.5
    medusa = create(target, head_coefficient=0.5, head_warmup_steps=100)
    weights = medusa(replace(read(target, medusa), step=50)).depth_weights
    assert weights == pytest.approx({k: joint.coefficient(50) * 0.8**k for k in (1, 2)})


def test_parameters_are_those_of_the_heads_and_the_formula_of_the_adapters(target: Target):
    count = sum(p.numel() for p in create(target).parameters())
    assert count == 2 * (D * D + D + V * D) + 2 * LORA.rank * ((D + D) + (2 * D + D))


def test_heads_have_their_own_learning_rate(target: Target):
    medusa = create(target, head_lr_multiplier=3.0)
    for name in ("adamw", "muon"):
        settings = TrainSettings(lr=0.1, optimizer=name)  # type: ignore[arg-type]
        optimizer = build_optimizer(medusa, settings, lr_factor=medusa.lr_factor)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(rates) == len(list(medusa.parameters()))
        for key, parameter in medusa.named_parameters():
            assert rates[id(parameter)] == pytest.approx(0.1 if key.startswith("adapter") else 0.3)


def test_peft_loads_the_adapter_and_gives_the_logits_of_the_hooks(target: Target, trained: Medusa, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained.save(tmp_path)
    assert trained.adapter is not None
    with torch.no_grad():
        with trained.adapter.applied(target.model):
            ours = target.model(TOKENS).logits
        base = AutoModelForCausalLM.from_pretrained(target.name, dtype=torch.float64)
        theirs = (
            PeftModel.from_pretrained(base, tmp_path / ADAPTER, autocast_adapter_dtype=False).double()(TOKENS).logits
        )
        added = merged(target, tmp_path / ADAPTER).model(TOKENS).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-10)
    torch.testing.assert_close(added, ours, rtol=0, atol=1e-10)
    assert (ours - target.model(TOKENS).logits).abs().max() > 1e-3


def test_the_evaluator_decodes_with_the_adapted_target_and_logs_it(target: Target, trained: Medusa, tmp_path: Path):
    folder, start = tmp_path / "drafter", tmp_path / "start"
    for path, medusa in ((folder, trained), (start, create(target))):
        path.mkdir()
        medusa.save(path)
        write_about(path, About("medusa", target.name, "", target.tokenizer_fingerprint, V, 0))
    prompts = [Prompt(str(i), [1 + i, 2, 3]) for i in range(3)]
    settings = EvalSettings(max_new_tokens=16, temperatures=[0.0], speed_prompts=0)
    result = evaluate({"drafter": folder, "start": start}, target, prompts, settings)
    assert result.drafters["start"].target == target.name
    assert result.drafters["drafter"].target == f"{target.name} with adapter"
    found = result.temperatures[0].drafters
    assert found["drafter"].parity.exact
    assert found["start"].parity.exact
    texts = ["".join(piece.text for piece in sample.pieces) for sample in found["drafter"].samples]
    others = ["".join(piece.text for piece in sample.pieces) for sample in found["start"].samples]
    assert texts != others  # two targets, and each drafter is exact for its own


def test_adapters_that_do_not_fit_are_refused(target: Target, trained: Medusa, tmp_path: Path, save_llama: Any):
    with pytest.raises(CheckpointError, match=r"is called c_attn\. There is .*q_proj"):
        LoraAdapter(replace(LORA, target_modules=["c_attn"]), linears_in(target.model))
    trained.save(tmp_path)
    other = Target.load(TargetSettings(model=str(save_llama(hidden_size=64))))
    with pytest.raises(CheckpointError, match="another shape"):
        merged(other, tmp_path / ADAPTER)
    with pytest.raises(CheckpointError, match="cannot read an adapter"):
        merged(target, tmp_path)
    assert LoraSettings(target_modules=[]).check()
    assert isinstance(trained.adapter, nn.Module)


@pytest.mark.parametrize("apart", [True, False], ids=["packed", "a row each"])
def test_dropout_depends_only_on_step_document_and_position(apart: bool) -> None:
    lora = replace(LORA, dropout=0.4, target_modules=["q_proj", "v_proj"])
    model = random_llama().double()
    if not apart:
        config = OPTConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2)
        config.word_embed_proj_dim = 32
        model = OPTForCausalLM(config).double()
    assert separates_documents(model) == apart
    whole = Target(model, byte_tokenizer(), name="tiny", fingerprint="")
    settings = MedusaSettings(num_heads=1, joint=JointSettings(lora=lora))
    medusa = Medusa.create(settings, target=whole, tokenizer=whole.tokenizer).double()
    assert medusa.adapter is not None
    for one in medusa.adapter.maps:
        nn.init.normal_(one.get_parameter("up"))
    records = [Record(str(i), range(3 + i, 9 + 2 * i), [True] * (6 + i)) for i in range(4)]

    def states(members: range, *, step: int = 3, width: int = 40) -> dict[int, torch.Tensor]:
        batch, places = pack(
            [records[i] for i in members], width=width, weight_of_step=1.0, step=step, first_document=members.start
        )
        batch = replace(batch, target=whole.read(batch.tokens_BT, batch.positions_BT, medusa.needs()))
        states_BTD = medusa(batch).states_BTD[1].detach()
        spans = zip(members, places, strict=True)
        return {i: states_BTD[row, column : column + 6 + i] for i, (row, column) in spans}

    together = states(range(4))
    pieces = states(range(2), width=12) | states(range(2, 4))
    for number, wanted_TD in together.items():
        torch.testing.assert_close(pieces[number], wanted_TD, rtol=0, atol=1e-12)
        assert not torch.allclose(states(range(4), step=4)[number], wanted_TD, atol=1e-3)
    medusa.eval()
    assert not torch.allclose(states(range(4))[0], together[0], atol=1e-3)
    evaluated = states(range(4))
    torch.testing.assert_close(states(range(4), step=4)[1], evaluated[1], rtol=0, atol=0)


def test_dropout_drops_the_share_that_is_set_and_keeps_the_mean() -> None:
    one = LowRank(replace(LORA, dropout=0.25), nn.Linear(64, 8))
    nn.init.normal_(one.get_parameter("up"))
    inputs_NI = torch.randn(64).expand(40_000, 64)
    plain_O, dropped_NO = one(inputs_NI[0]), one(inputs_NI, torch.arange(40_000))
    error_O = dropped_NO.std(dim=0) / 200
    assert bool(((dropped_NO.mean(dim=0) - plain_O).abs() < 5 * error_O).all())
    share_I = chosen(torch.arange(40_000), 63, share=0.25).double().mean(dim=0)
    assert float((share_I - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 40_000)


def test_dropout_is_refused_for_a_layer_that_does_not_read_every_token_once(target: Target) -> None:
    adapter = LoraAdapter(replace(LORA, dropout=0.1), linears_in(target.model))
    seed_BT = torch.zeros(1, 4, dtype=torch.long)
    with (
        adapter.applied(target.model, seed_BT=seed_BT),
        pytest.raises(
            CheckpointError, match=r"lora\.dropout: .*q_proj does not read every token exactly once.* set it to 0"
        ),
    ):
        target.model(TOKENS)
