"""vLLM as an engine: what it cannot run is refused before it starts."""

from __future__ import annotations

import json

from drafttrain.serving.engines import engine_of


def test_what_vllm_cannot_run_is_refused_before_it_starts(tmp_path):
    engine = engine_of("vllm")
    folder = tmp_path / "eagle3_beside" / "drafter"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_size": 64}))
    fine = {"num_attention_heads": 2, "hidden_size": 64}
    found = engine.problems(folder, "causal_lm", fine)
    assert all(any(word in one for one in found) for word in ("'eagle3' in its path", "attention heads of size 16"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(fine))
    assert engine.problems(tmp_path / "plain", "causal_lm", fine) == []
