"""The target's states, fingerprints and refusals."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from drafttrain.core.errors import CheckpointError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.tensors import read_tensors
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.folders import config_folder, fingerprint_of, resolve_folder
from drafttrain.target_model.loading import load_causal_lm
from drafttrain.target_model.logits import head_logits
from drafttrain.target_model.tokenizer import check_same_tokenizer, load_tokenizer

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16),
    "gemma": GemmaConfig(**SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=2, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_and_head_reproduce_the_models_own_logits(name: str, tiny_target: Target) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    target = Target(model, tiny_target.tokenizer, name=name, fingerprint="")
    tokens_BT = torch.randint(61, (2, 9))
    positions_BT = torch.arange(9).expand(2, 9)
    seen = target.read(tokens_BT, positions_BT, TargetNeeds(logits=True, hidden=(0, 1, 3), final=True))
    plain = model(tokens_BT, output_hidden_states=True, use_cache=False)
    assert seen.logits_BTV is not None
    assert seen.final_BTD is not None
    torch.testing.assert_close(seen.logits_BTV, plain.logits)
    torch.testing.assert_close(head_logits(model, seen.final_BTD), plain.logits)
    torch.testing.assert_close(seen.hidden_BTD[1], plain.hidden_states[1])
    torch.testing.assert_close(seen.final_BTD, plain.hidden_states[3])
    after_last_block = target.read(tokens_BT, positions_BT, TargetNeeds(hidden=(3,))).hidden_BTD[3]
    assert not torch.allclose(after_last_block, plain.hidden_states[3]), "hidden[n] is before the final norm"
    assert len(blocks(model)) == 3


def test_a_tap_outside_the_model_is_refused(tiny_target: Target) -> None:
    tokens_BT = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(CheckpointError, match=r"hidden state 9 does not exist: 0\.\.2"):
        tiny_target.read(tokens_BT, torch.arange(3)[None], TargetNeeds(hidden=(9,)))


def test_one_changed_weight_changes_the_fingerprint(save_llama, tmp_path: Path) -> None:
    folder = save_llama(seed=3)
    before = fingerprint_of(folder)
    assert fingerprint_of(folder) == before
    model = load_causal_lm(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path)
    assert fingerprint_of(tmp_path) != before


def test_a_tokenizer_that_differs_in_one_token_is_refused_naming_it(tiny_target: Target) -> None:
    from tests.conftest import byte_tokenizer

    other = byte_tokenizer()
    check_same_tokenizer(tiny_target.tokenizer, other, drafter="same")
    other.add_tokens([AddedToken("<extra>")])
    with pytest.raises(CheckpointError, match=r"differs from the target's in 1 of 257 tokens: '<extra>'"):
        check_same_tokenizer(tiny_target.tokenizer, other, drafter="drafter/")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:nothing", "no such builtin"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("my models/foo", "not a local folder, and fetching it from the hub failed"),
    ],
)
def test_a_missing_model_is_named(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_folder(name)


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="fetching it from the hub failed"):
        resolve_folder("runs/nothing")
    (tmp_path / "runs").mkdir()
    for find in (resolve_folder, config_folder):
        with pytest.raises(CheckpointError, match="runs/nothing: no such folder in runs, which is here"):
            find("runs/nothing")


def test_a_hub_model_in_the_cache_is_found_beside_a_folder_of_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    held = tmp_path / "cache" / "models--owner--name"
    (held / "snapshots" / commit).mkdir(parents=True)
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text(commit)
    (held / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert resolve_folder("owner/name") == held / "snapshots" / commit
    with pytest.raises(CheckpointError, match="no such folder in owner"):
        resolve_folder("owner/other")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        load_causal_lm(tmp_path)


def test_weights_missing_from_the_file_are_an_error(save_llama, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_llama(seed=1)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are missing from its files"):
        load_causal_lm(folder)


def test_a_truncated_file_of_weights_is_named(save_llama) -> None:
    folder = save_llama(seed=2)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot load a causal LM"):
        load_causal_lm(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the weights cannot be read"):
        read_tensors(path)


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"model": 3}'])
def test_a_broken_tokenizer_is_named(save_llama, content: str) -> None:
    folder = save_llama(seed=2)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_text_beyond_the_position_embeddings_is_refused(tiny_target: Target) -> None:
    gpt2 = AutoModelForCausalLM.from_config(ARCHITECTURES["gpt2"]).eval()
    target = Target(gpt2, tiny_target.tokenizer, name="gpt2", fingerprint="")
    target.check_length(64, what="a prompt")
    with pytest.raises(CheckpointError, match="a prompt: 65 tokens are more than the 64 positions of gpt2"):
        target.check_length(65, what="a prompt")
    lm = CachedLM(gpt2, name="drafter")
    lm.begin([[1] * 63])
    lm.forward([[2]])
    with pytest.raises(CheckpointError, match="drafter: token 65 is beyond the 64 position embeddings"):
        lm.forward([[3]])
    tiny_target.check_length(1 << 20, what="rotary positions have no end")


def test_the_target_is_frozen_and_has_end_tokens(tiny_folder: Path) -> None:
    target = Target.load(TargetSettings(model=str(tiny_folder)))
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    assert target.eos_token_ids == (0,)
    assert target.vocab_size == target.num_tokens == 257
