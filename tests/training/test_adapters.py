"""Training of adapters beside a frozen drafter: what is stored, what resumes, and that no layout changes a number."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.drafters.lora import LoraAdapter, LoraSettings
from drafttrain.training import compiled
from tests.conftest import random_llama
from tests.marks import slow
from tests.training.layouts import run

CLOSE = {"abs": 1e-5}
LORA = LoraSettings(rank=2, dropout=0.3, target_modules=["q_proj", "v_proj", "down_proj"])
PLAIN = LoraSettings(rank=2, target_modules=["q_proj", "down_proj", "fc"])
EAGLE3: dict[str, Any] = {"kind": "eagle3", "of_kind": {"num_steps": 3, "draft_vocab_size": 100}, "lora": PLAIN}
BLOCK: dict[str, Any] = {
    "kind": "dflash",
    "of_kind": {"num_layers": 2, "taps": [1], "block_size": 4, "anchors": 8, "mask_token_id": 0},
    "lora": PLAIN,
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def test_only_adapters_are_stored_and_the_weights_beside_them_stay_bit_for_bit(tmp_path: Path):
    run(tmp_path / "run", lora=LORA, steps=3)
    run(tmp_path / "whole", steps=3)
    stored, whole = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000003.ckpt", weights_only=True)
        for name in ("run", "whole")
    )
    names = [name for name in stored["state_dict"] if name.startswith("trained.")]
    assert names
    assert all(name.startswith("trained.lora.maps.") for name in names)
    assert len(stored["optimizer_states"][0]["state"]) == len(names)
    moments = [state["exp_avg"] for state in stored["optimizer_states"][0]["state"].values()]
    assert sum(one.numel() for one in moments) == sum(stored["state_dict"][name].numel() for name in names)
    sizes = [(tmp_path / name / "checkpoints" / "step-00000003.ckpt").stat().st_size for name in ("run", "whole")]
    assert sizes[0] < sizes[1] / 2
    assert any(not name.startswith("trained.lora.") for name in whole["state_dict"])
    base, now, other = (
        random_llama(seed=1, num_layers=1).state_dict(),
        weights(tmp_path / "run"),
        weights(tmp_path / "whole"),
    )
    changed = {name.rsplit(".", 2)[-2] for name in now if not torch.equal(now[name], base[name])}
    assert changed == set(LORA.target_modules)
    assert not any(torch.equal(other[name], base[name]) for name in other), "the control: all weights are trained"


@pytest.mark.parametrize("settings", [{"lora": LORA}, EAGLE3], ids=["causal_lm", "eagle3"])
def test_a_resumed_training_of_adapters_is_bit_for_bit_the_same(settings: dict[str, Any], tmp_path: Path):
    whole = run(tmp_path / "whole", **settings, steps=6)
    run(tmp_path / "parts", **settings, steps=3)
    (tmp_path / "parts" / "train.json").unlink()
    assert run(tmp_path / "parts", **settings, steps=6) == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_of_other_weights_are_not_resumed(tmp_path: Path):
    class Changed(CausalLMDrafter):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            model.model.norm.weight.data += 1e-3

    run(tmp_path, lora=LORA, steps=3)
    (tmp_path / "train.json").unlink()
    with pytest.raises(CheckpointError, match="trained beside other weights"):
        run(tmp_path, lora=LORA, steps=6, drafter=Changed)


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        slow({"lora": LORA}, 2),
        ({"lora": LORA}, 3),
        (EAGLE3, 3),
        *(pytest.param(one, stage, marks=pytest.mark.slow) for one, stage in ((EAGLE3, 2), (BLOCK, 2), (BLOCK, 3))),
    ],
    ids=["causal_lm-2", "causal_lm-3", "eagle3-3", "eagle3-2", "dflash-2", "dflash-3"],
)
def test_one_process_under_zero(settings: dict[str, Any], stage: int, tmp_path: Path):
    # AdamW's first steps have the size of the rate, whatever the gradient: where it is all rounding, they would differ.
    alone = run(tmp_path / "plain", **settings, optimizer="sgd", steps=3)
    spread = run(tmp_path / "zero", **settings, optimizer="sgd", steps=3, stage=stage)
    assert spread == pytest.approx(alone, **CLOSE)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "zero")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-5)


def test_dropout_is_drawn_again_the_same_for_recomputed_activations(tmp_path: Path):
    plain = run(tmp_path / "plain", lora=LORA)
    assert run(tmp_path / "again", lora=LORA, activation_checkpointing=True) == pytest.approx(plain, **CLOSE)
    without = run(tmp_path / "without", lora=LoraSettings(rank=2, target_modules=LORA.target_modules))
    assert without != pytest.approx(plain, abs=1e-4)


def test_control_recomputed_activations_with_other_dropout_are_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = run(tmp_path / "plain", lora=LORA)
    seeds, calls = LoraAdapter._seeds, count()

    def of_call(*given: Any) -> Any:
        found = seeds(*given)
        return None if found is None else found + next(calls)

    monkeypatch.setattr(LoraAdapter, "_seeds", of_call)
    assert run(tmp_path / "again", lora=LORA, activation_checkpointing=True) != pytest.approx(plain, **CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("settings", [slow({"lora": LORA}), EAGLE3], ids=["causal_lm", "eagle3"])
def test_a_compiled_training_of_adapters_is_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Functions are traced, and their graphs run as they are."""
    traced: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, inputs: (traced.append(graph), graph.forward)[1])
    torch._dynamo.reset()
    plain = run(tmp_path / "plain", **settings, steps=3)
    assert run(tmp_path / "fast", **settings, steps=3, compile=True) == pytest.approx(plain, **CLOSE)
    assert len(traced) >= 2, "the drafter and the loss"
