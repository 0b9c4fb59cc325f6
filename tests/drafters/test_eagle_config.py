"""Damaged config.json files or vocabulary maps of EAGLE drafters are refused with the key, by every reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafttrain.checkpoint import read_about, read_drafter
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.eagle.eagle3 import Eagle3Drafter, Eagle3Settings
from drafttrain.export.drafter_files import DrafterFiles
from drafttrain.export.folder import read_files
from drafttrain.export.layout import layout_problems
from drafttrain.losses.align import align
from drafttrain.serving.draft_length import best_length, read_evaluation
from drafttrain.target_model import Target, TargetSettings


@pytest.fixture(scope="module")
def target(save_llama: Any) -> Target:
    return Target.load(TargetSettings(model=str(save_llama(num_layers=4))))


@pytest.fixture(scope="module")
def saved(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("eagle3") / "drafter"
    settings = Eagle3Settings(draft_vocab_size=64)
    Eagle3Drafter.create(settings, target=target, tokenizer=target.tokenizer).save(folder)
    about = {"kind": "eagle3", "target": target.name, "target_fingerprint": "", "vocab_size": 257, "trained_steps": 0}
    about["tokenizer_fingerprint"] = target.tokenizer_fingerprint
    (folder / "drafttrain.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "drafter"))


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rope_parameters": "x"}, "rope_parameters must be a mapping, got 'x'"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "rope_parameters must hold a name"),
        ({"rope_scaling": [1]}, "rope_scaling must be a mapping"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0, got 0"),
        ({"intermediate_size": None}, "intermediate_size must be a whole number of 1 or more, got None"),
        ({"drafttrain": [1]}, r"drafttrain must be a mapping, got \[1\]"),
        ({"drafttrain": {"zip": 1}}, "drafttrain.num_steps is missing"),
        ({"drafttrain": {"num_steps": 10**30}}, "drafttrain.num_steps must be a whole number of 1..4096"),
        ({"drafttrain": {"draft": "zip"}}, "drafttrain.draft must be sampled or greedy, got 'zip'"),
        ({"drafttrain": {"step_decay": []}}, "drafttrain.step_decay must be a number"),
        ({"eagle_aux_hidden_state_layer_ids": [1, "x", 3]}, "eagle_aux_hidden_state_layer_ids must be a list of whole"),
    ],
)
def test_fields_with_wrong_types_are_named(folder: Path, target: Target, fields: dict[str, Any], reason: str) -> None:
    changed(folder, **fields)
    with pytest.raises(CheckpointError, match=reason):
        read_drafter(folder, target)
    assert layout_problems(read_files(folder), {"vocab_size": 257})


def test_the_undamaged_folder_is_loaded(folder: Path, target: Target) -> None:
    assert read_drafter(folder, target).kind == "eagle3"
    assert not layout_problems(read_files(folder), {"vocab_size": 257})


@pytest.mark.parametrize("shift", [10**12, -(10**6), 200])
def test_a_map_beyond_the_targets_ids_is_refused(folder: Path, target: Target, shift: int) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"d2t": tensors["d2t"] + shift}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="d2t"):
        read_drafter(folder, target)


@pytest.mark.parametrize("count", [4096, "5", 0])
def test_heads_that_the_file_does_not_have_are_refused_at_once(count: Any) -> None:
    """Reporting 4,096 heads of 4,096 blocks as missing one by one took minutes."""
    config = {"num_heads": count, "num_hidden_layers": count, "hidden_size": 32, "vocab_size": 257}
    files = DrafterFiles("medusa", config, {"lm_heads.0.weight": torch.zeros(257, 32)})
    assert "num_heads must be a whole number of 1..1" in layout_problems(files, {})[0]


def test_a_causal_lm_of_another_kind_is_one_problem() -> None:
    files = DrafterFiles("causal_lm", {"model_type": "medusa"}, {})
    (problem,) = layout_problems(files, {})
    assert "no causal_lm can be built from it" in problem
    assert len(problem) < 300


def test_an_unknown_value_of_draft_is_refused(folder: Path) -> None:
    about = json.loads((folder / "drafttrain.json").read_text())
    (folder / "drafttrain.json").write_text(json.dumps(about | {"draft": "zip"}))
    with pytest.raises(CheckpointError, match="draft must be sampled or greedy, got 'zip'"):
        read_about(folder)


@pytest.mark.parametrize(
    "content",
    ["[]", "[" * 100_000, '{"temperatures": 5}', '{"temperatures": []}', '{"temperatures": [{"temperature": 0}]}'],
)
def test_a_damaged_evaluation_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"eval\.json"):
        best_length(read_evaluation(tmp_path))


def test_texts_shorter_than_the_rollout_have_no_rows_at_its_depths() -> None:
    """Four tokens and a rollout of seven once raised a shape error."""
    batch = DraftBatch(
        tokens_BT=torch.arange(4)[None],
        positions_BT=torch.arange(4)[None],
        documents_BT=torch.zeros(1, 4, dtype=torch.long),
        loss_mask_BT=torch.ones(1, 4, dtype=torch.bool),
        weight_of_step=1.0,
    )
    states = {depth: torch.zeros(1, 4, 2) for depth in range(1, 9)}
    rows = align(DraftOutput(states, None, 1), batch)
    assert [rows.counts[depth] for depth in states] == [2, 1, 0, 0, 0, 0, 0, 0]
