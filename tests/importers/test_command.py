"""drafttrain import: it prints what it changed; a problem ends with exit code 1 and writes nothing."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

from drafttrain.cli import app
from tests.importers import given


def call(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["import", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def test_an_import_prints_what_it_changed_and_where_the_drafter_is(save_llama, tmp_path):
    target = str(save_llama(num_layers=4))
    folder = given.write(tmp_path / "theirs", given.eagle3_tensors("layers.0."), given.modelopt_config())
    printed = call(str(folder), "--target", target)
    assert "taps [0, 1, 2] of eagle_config are blocks whose output is read; they become [1, 2, 3]" in printed
    assert "(drafter.kind eagle3)" in printed
    assert given.same(given.held(tmp_path / "theirs.drafter"), given.eagle3_tensors())


def test_a_problem_ends_with_exit_code_1_and_no_folder(save_llama, tmp_path):
    tensors = given.eagle3_tensors() | {"extra": torch.ones(1)}
    folder = given.write(tmp_path / "theirs", tensors, given.eagle3_config())
    printed = call(str(folder), "--target", str(save_llama(num_layers=4)), code=1)
    assert "model.safetensors: extra: this layout has no such tensor" in printed
    assert not (tmp_path / "theirs.drafter").exists()
    assert "no such folder" in call(str(tmp_path / "none"), "--target", "x", code=2)
