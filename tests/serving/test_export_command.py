"""drafttrain export: formats beside the drafter folder, refused arguments, missing engines."""

from __future__ import annotations

from typer.testing import CliRunner

from drafttrain.cli import app


def test_a_format_is_written_beside_the_folder_and_arguments_are_checked(evaluated):
    folder = evaluated("medusa")
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "vllm"])
    assert done.exit_code == 0, done.stderr
    assert (folder.with_name("drafter.vllm") / "model.safetensors").exists()
    for words, message in (
        (["--verify"], "add --to FORMAT"),
        (["--to", "vllm", "--to", "hf", "--out", "x"], "--out takes one format"),
        (["--to", "vllm", "--speed"], "add --verify"),
    ):
        refused = CliRunner().invoke(app, ["export", str(folder), *words])
        assert refused.exit_code == 2
        assert message in refused.stderr
    unknown = CliRunner().invoke(app, ["export", str(folder), "--to", "vlm"])
    assert "unknown export format 'vlm'. Did you mean 'vllm'?" in unknown.stderr


def test_an_engine_that_is_missing_stops_the_export_before_it_begins(evaluated, monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "none"))
    folder = evaluated("medusa")
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "vllm", "--verify"])
    assert done.exit_code == 1
    assert "drafttrain engines install vllm" in done.stderr
    assert not folder.with_name("drafter.vllm").exists()
