"""drafttrain extract: a part of a nested drafter as a drafter folder of kind causal_lm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.checkpoint import About, read_about, read_drafter, write_about
from drafttrain.drafters.sorted_lm.module import SortedLMDrafter, SortedLMSettings
from drafttrain.export.hf import export_hf
from drafttrain.target_model import Target
from drafttrain.target_model.tokenizer import tokenizer_fingerprint
from tests.cli.test_cli import call


@pytest.fixture
def folder(tiny_target: Target, tmp_path: Path) -> Path:
    settings = SortedLMSettings(num_layers=3, exits=[1, 2], hidden_size=32, num_heads=1, intermediate_size=48)
    torch.manual_seed(0)
    drafter = SortedLMDrafter.create(settings, target=tiny_target, tokenizer=tiny_target.tokenizer)
    (tmp_path / "weights").mkdir()
    drafter.save(tmp_path / "weights")
    about = About("sorted_lm", "x", "", tokenizer_fingerprint(tiny_target.tokenizer), tiny_target.num_tokens, 1)
    export_hf(tmp_path / "weights", tmp_path / "drafter", tokenizer=tiny_target.tokenizer, about=about, dtype="float32")
    return tmp_path / "drafter"


@torch.no_grad()
def test_a_sub_model_is_a_causal_lm_that_drafts_as_its_exit(folder: Path, tiny_target: Target, tmp_path: Path) -> None:
    stdout = "".join(call("extract", str(folder), str(tmp_path / "two"), "--layers", "2"))
    assert "parameters, a drafter of kind causal_lm" in stdout
    about = read_about(tmp_path / "two")
    assert about is not None
    assert about.kind == "causal_lm"
    whole, part = (read_drafter(one, tiny_target).model for one in (folder, tmp_path / "two"))
    tokens = torch.arange(7)[None]
    found, seen = part(tokens).logits, whole(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, whole.lm_head(whole.model.norm(seen[2])))
    assert (found - whole(tokens).logits).norm() > 1e-3 * found.norm()
    call("extract", str(folder), str(tmp_path / "mixed"), "--ffn", "12", "--ffn", "48", "--ffn", "24")
    mixed = read_drafter(tmp_path / "mixed", tiny_target).model
    assert mixed.config.intermediate_size == 48
    assert not mixed.model.layers[0].mlp.down_proj.weight[:, 12:].any()
    call("extract", str(folder), str(tmp_path / "quarter"), "--ffn", "12")
    assert read_drafter(tmp_path / "quarter", tiny_target).model.config.intermediate_size == 12


def test_what_cannot_be_extracted_is_refused(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert (
        "its first layers must be 1..3 for this drafter, got 4"
        in call("extract", str(folder), out, "--layers", "4", code=1)[1]
    )
    assert "1..48, got 49" in call("extract", str(folder), out, "--ffn", "49", code=1)[1]
    assert "exists already" in call("extract", str(folder), str(folder), code=1)[1]
    about = read_about(folder)
    assert about is not None
    write_about(folder, About(**{**vars(about), "kind": "medusa"}))
    assert "this one is of kind medusa" in call("extract", str(folder), out, code=1)[1]
    (folder / "drafttrain.json").unlink()
    assert "a plain model, not a drafter folder" in call("extract", str(folder), out, code=1)[1]
    assert not Path(out).exists()
