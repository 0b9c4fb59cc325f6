"""Several processes that let a server or an engine generate texts: the same records, each shard requested by one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from drafttrain.distributed.world import without_launcher
from drafttrain.target_model import Target, TargetSettings
from tests.data_gen.backends.completions_server import CompletionsServer, Fault, serving, status

NUM_RECORDS = 14
RECIPE = """
name: written
target: {{model: {target}}}
drafter: {{kind: causal_lm, num_layers: 1, hidden_size: 32, num_heads: 1}}
loss: {{kind: forward_kl}}
data:
  max_length: 24
  overlap_ngram: 40
  generate: {{num_records: 14, records_per_shard: 3, max_new_tokens: 10, prompt_tokens: 6, temperatures: [0.0],
             prompts: {{kind: jsonl, path: {prompts}}},
             backend: {{kind: openai, base_url: "{url}", model: served, concurrency: 2, retries: 1, backoff_seconds: 0.01}}}}
  sources: [{{kind: generated}}]
train: {{max_steps: 6, batch_size: 4, warmup_steps: 2}}
eval: {{prompts: {prompts}, validation_prompts: {prompts}, prompt_tokens: 6}}
"""


@pytest.fixture
def target(tiny_folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(tiny_folder)))


def generated(tmp_path: Path, target: Target, server: CompletionsServer, *, processes: int) -> tuple[Path, str]:
    """Run `drafttrain gen` under torchrun against the server; return the folder of the texts and its output."""
    lines = [json.dumps({"id": str(i), "text": f"dog {i:02}"}) for i in range(NUM_RECORDS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / f"{processes}.yaml"
    runs = tmp_path / f"runs{processes}"
    with serving(server) as url:
        recipe.write_text(RECIPE.format(target=target.name, prompts=tmp_path / "prompts.jsonl", url=url))
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        done = subprocess.run(
            [sys.executable, "-m", *torchrun, "drafttrain", "gen", str(recipe), "--runs", str(runs)],
            env=without_launcher(os.environ) | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return runs / "written" / "data" / "generated", done.stderr


@pytest.mark.processes
def test_two_processes_request_the_same_records_as_one_and_each_once(tmp_path: Path, target: Target) -> None:
    def fault(number: int, request: Mapping[str, Any]) -> Fault | None:
        return status(400) if target.tokenizer.decode(request["prompt"]) in ("dog 04", "dog 09") else None

    folders, asked = [], []
    for processes in (1, 2):
        server = CompletionsServer(target, fault)
        folder, said = generated(tmp_path, target, server, processes=processes)
        folders.append(folder)
        asked.append(Counter(tuple(one["prompt"]) for one in server.asked))
        assert set(server.answered.values()) == {1}, "no text is requested twice"
    one, two = folders
    names = {path.name for path in one.glob("*.json*")}
    assert {"shard-00000.jsonl", "shard-00004.jsonl", "manifest.json"} <= names
    assert {path.name for path in two.glob("*.json*")} == names, "nothing is left of answers on their way"
    for name in names - {"plan.json", "manifest.json"}:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert manifests[0] == manifests[1]
    assert manifests[0]["accounts"]["set_aside"] == {"http_400": 2}
    assert asked[0] == asked[1]
    assert "2 processes on 1 host" in said
    assert said.count("generated: 12 texts") == 1, "only the first process speaks"
