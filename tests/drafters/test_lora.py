"""Adapters beside a drafter's own weights: nothing changes at the start, the export is the adapted drafter, the base stays."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drafttrain.config.load import load_recipe
from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import CheckpointError, RecipeError
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters import Drafter, drafters
from drafttrain.drafters.lora import LoraSettings
from drafttrain.target_model import Target
from tests.conftest import byte_tokenizer, random_llama
from tests.eval.decoding import decode

BLOCK = {"num_layers": 2, "taps": [1], "block_size": 4, "anchors": 8, "mask_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "causal_lm": {"hidden_size": 48, "num_heads": 3, "num_layers": 2},
    "sorted_lm": {"hidden_size": 48, "num_heads": 3, "num_layers": 2},
    "eagle": {"num_steps": 2, "feature_noise": 0.0},
    "eagle3": {"num_steps": 3, "draft_vocab_size": 100},
    "p_eagle": {"num_layers": 2, "num_depths": 3, "mask_token_id": 0},
    "chimera": {"num_steps": 3, "draft_vocab_size": 100},
    "mtp": {"init": "random", "num_steps": 2},
    "dflash": BLOCK,
    "domino": {**BLOCK, "gru_hidden_dim": 8, "emb_dim": 4},
    "xpress": {**BLOCK, "rank": 8, "mlp_hidden": 16},
    "dflash2": {**BLOCK, "selector_rank": 4, "selector_top_k": 40},
    "dspark": BLOCK,
}
TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 40], [20, 21, 22, 23, 24, 25]]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(random_llama(num_layers=4), byte_tokenizer(), name="tiny", fingerprint="")


def made(kind: str, target: Target) -> Drafter:
    torch.manual_seed(0)
    entry: Any = drafters.entry(kind)
    drafter: Drafter = entry.component.create(entry.settings(**KINDS[kind]), target=target, tokenizer=target.tokenizer)
    for parameter in drafter.parameters():
        # What starts at zero would hide what a layer before it changes.
        parameter.data += 0.02 * torch.randn_like(parameter)
    return drafter.eval()


def everywhere(drafter: Drafter, **settings: Any) -> LoraSettings:
    """Return adapters beside all layers that can have one."""
    names = sorted({name.rsplit(".", 1)[-1] for name in drafter.adaptable()})
    return LoraSettings(rank=2, alpha=6.0, target_modules=names, **settings)


def adapted(kind: str, target: Target, **settings: Any) -> Drafter:
    """Return a drafter with adapters that have been trained."""
    drafter = made(kind, target)
    drafter.train_adapters(everywhere(drafter, **settings))
    disturb(drafter)
    return drafter


def disturb(drafter: Drafter) -> None:
    assert drafter.lora is not None
    for one in drafter.lora.maps:
        one.get_parameter("up").data.normal_(std=0.1)


def batch_of(drafter: Drafter, target: Target) -> DraftBatch:
    records = [Record(str(n), text, [n > 0 for n in range(len(text))]) for n, text in enumerate(TEXTS)]
    batch, _ = pack(records, width=16, weight_of_step=1.0)
    return replace(batch, target=target.read(batch.tokens_BT, batch.positions_BT, drafter.needs()))


@torch.no_grad()
def logits_of(drafter: Drafter, batch: DraftBatch) -> Tensor:
    """Return the logits of every depth; 0 for tokens that are no candidates."""
    drafted = drafter(batch)
    logits = [drafted.head(states.flatten(0, 1), depth) for depth, states in drafted.states_BTD.items()]
    return torch.stack(logits).nan_to_num(neginf=0.0)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def frozen_digest(drafter: Drafter) -> str:
    digest = hashlib.sha256()
    for name, weight in drafter.named_parameters():
        if not name.startswith("lora."):
            digest.update(name.encode() + weight.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_no_bit_and_trained_ones_do(kind: str, target: Target):
    drafter = made(kind, target)
    batch = batch_of(drafter, target)
    before = logits_of(drafter, batch)
    drafter.train_adapters(everywhere(drafter))
    assert torch.equal(logits_of(drafter, batch), before)
    disturb(drafter)
    assert distance(logits_of(drafter, batch), before) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_has_the_drafters_own_names_and_the_logits_of_the_adapted_one(
    kind: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drafter = adapted(kind, target)
    batch = batch_of(drafter, target)
    ours, digest = logits_of(drafter, batch), frozen_digest(drafter)

    def exported(name: str) -> Drafter:
        (tmp_path / name).mkdir()
        drafter.save(tmp_path / name)
        target.tokenizer.save_pretrained(tmp_path / name)
        loaded: Drafter = type(drafter).load(tmp_path / name, target, "float32")
        assert loaded.lora is None
        return loaded

    assert distance(logits_of(exported("right"), batch), ours) < 1e-5
    assert frozen_digest(drafter) == digest
    assert torch.equal(logits_of(drafter, batch), ours)
    for one in drafter.lora.maps:  # type: ignore[union-attr]
        monkeypatch.setattr(one, "merged_into", lambda weight_OI, one=one: weight_OI + one.up @ one.down)
    assert distance(logits_of(exported("wrong scale"), batch), ours) > 1e-2
    plain = made(kind, target)
    (tmp_path / "plain").mkdir()
    plain.save(tmp_path / "plain")
    right, names = (load_file(tmp_path / name / "model.safetensors").keys() for name in ("right", "plain"))
    assert right == names


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_their_number_is_the_formula(kind: str, target: Target):
    drafter = made(kind, target)
    layers = drafter.adaptable().values()
    drafter.train_adapters(everywhere(drafter))
    trained = {name: p.numel() for name, p in drafter.named_parameters() if p.requires_grad}
    assert all(name.startswith("lora.") for name in trained)
    assert sum(trained.values()) == sum(2 * (layer.in_features + layer.out_features) for layer in layers)


def test_parts_that_are_named_are_trained_whole(target: Target):
    drafter = made("eagle3", target)
    drafter.train_adapters(LoraSettings(rank=2, whole_modules=["norm", "lm_head"]))
    own = [name for name, p in drafter.named_parameters() if p.requires_grad and not name.startswith("lora.")]
    assert own == ["norm.weight", "lm_head.weight"]


def test_modules_that_are_not_there_are_refused_with_those_that_are(target: Target):
    for settings, said in [
        (
            LoraSettings(target_modules=["c_attn"]),
            r"target_modules: no linear .* c_attn\. There is down_proj, fc, .*q_proj",
        ),
        (LoraSettings(target_modules=["q_proj", "lm_head"]), "called lm_head"),
        (LoraSettings(whole_modules=["wte"]), r"whole_modules: this drafter has no part called wte\. It has .*lm_head"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            made("eagle3", target).train_adapters(settings)
    with pytest.raises(CheckpointError, match="called lm_head"):
        made("causal_lm", target).train_adapters(LoraSettings(target_modules=["lm_head"]))
    assert LoraSettings(target_modules=["fc"], whole_modules=["fc"]).check()


def test_peft_gives_the_logits_and_the_merged_weights(target: Target, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    drafter = adapted("causal_lm", target)
    assert drafter.lora is not None
    settings = drafter.lora.settings
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.target_modules)
    base: Any = made("causal_lm", target)
    theirs = get_peft_model(base.model, config).eval()
    for name, pair in drafter.lora.tensors().items():
        layer = theirs.get_submodule(f"base_model.{name}")
        for mine, held in zip(pair, (layer.lora_A, layer.lora_B), strict=True):
            held.default.weight.data.copy_(mine)
    tokens = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        ours = drafter.model(tokens).logits
        assert distance(theirs(tokens).logits, ours) < 1e-5
        assert distance(base.model(tokens).logits, ours) < 1e-5, "peft has changed it in place"
    drafter.save(tmp_path)
    unloaded = theirs.merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weight, unloaded[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal_lm", "eagle3", "dflash"])
def test_it_drafts_in_memory_what_the_export_drafts(kind: str, target: Target, tmp_path: Path):
    drafter = adapted(kind, target)
    drafter.save(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    arms = [drafter, type(drafter).load(tmp_path, target, "float32"), made(kind, target)]
    ours, exported, base = (drafts_of(one, target) for one in arms)
    assert ours == exported
    assert ours != base


def drafts_of(drafter: Drafter, target: Target) -> list[list[int]]:
    """Return the draft tokens after some prompts."""
    proposer, seen = drafter.proposer(target), []
    propose = proposer.propose

    def noted(*arguments: Any) -> Any:
        proposals = propose(*arguments)
        seen.extend([proposal.tokens_N.tolist() for proposal in proposals])
        return proposals

    proposer.propose = noted  # type: ignore[method-assign]
    decode(target, proposer, new=12, stop_tokens=())
    return seen


LORA = "drafter.lora={rank: 2}"
ONLINE = "drafter={kind: causal_lm, init: checkpoint, checkpoint: here, lora: {rank: 2}}"


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("tiny_eagle3", [LORA], r"drafter\.lora: adapters need trained weights beside them"),
        ("tiny_dflash", [LORA], r"drafter\.lora: adapters need trained weights beside them"),
        ("demo", [LORA, "drafter.init=scratch", "drafter.checkpoint=null"], r"drafter\.lora: adapters need trained"),
        (
            "demo",
            [LORA, "drafter.freeze_embedding=true"],
            r"drafter\.freeze_embedding: with lora all weights are frozen",
        ),
        ("demo", [LORA, "train.pretrain={max_steps: 60}"], r"train\.pretrain: it trains all weights"),
        ("demo", ["drafter.lora={target_modules: []}"], r"target_modules: at least one name"),
        ("demo", ["drafter.lora={rank: 0}"], r"drafter\.lora\.rank: must be >= 1, got 0"),
        (
            "smollm2_eagle3",
            ["drafter={kind: eagle3, checkpoint: here, lora: {dropout: 0.1}}"],
            r"lora\.dropout: .* set it to 0",
        ),
        ("online", [ONLINE], r"drafter\.lora: online learning .* trains all of them"),
        ("tiny_medusa2", ["drafter.joint={lora: {whole_modules: [norm]}}"], r"whole_modules: the target's own weights"),
        ("tiny_medusa", [LORA], r"drafter\.lora: unknown key"),
    ],
)
def test_where_adapters_do_not_work_they_are_refused_by_name(recipe: str, overrides: list[str], said: str):
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe, overrides)


def test_the_recipe_gives_the_adapters(target: Target):
    settings = load_recipe("demo", ["drafter.lora={rank: 2, target_modules: [q_proj]}"]).drafter
    assert settings.lora == LoraSettings(rank=2, target_modules=["q_proj"])
    joint = load_recipe("tiny_medusa2", ["drafter.joint.lora={rank: 2}"]).drafter.joint
    assert (joint.lora.rank, joint.lora.dropout) == (2, 0.05)
    given = replace(settings, init="target", checkpoint=None, num_layers=1)
    entry: Any = drafters.entry("causal_lm")
    drafter = entry.component.for_training(given, target=target, tokenizer=target.tokenizer)
    assert drafter.lora.names == ["model.model.layers.0.self_attn.q_proj"]
