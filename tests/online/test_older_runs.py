"""A run folder of an older version, which called routes lanes, is resumed and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from drafttrain.online.report import write_online_report
from drafttrain.online.run_files import metrics, status
from tests.online.test_loop import online_run, prompts, serve, start


def write_as_an_older_version(run: Path) -> None:
    """Rewrite the files of a run with the keys that older versions used."""
    state_file, metrics_file = run / "online" / "state.pt", run / "online" / "metrics.jsonl"
    state = torch.load(state_file, weights_only=True)
    state["lanes"] = state.pop("routes")
    torch.save(state, state_file)
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    older = [{"lane": row.pop("route")} | row for row in rows]
    metrics_file.write_text("".join(json.dumps(row) + "\n" for row in older))


@pytest.mark.long
def test_a_run_of_an_older_version_is_resumed_and_reported(tmp_path, tiny_target):
    first = start(tmp_path, tiny_target)
    drafters, log = tmp_path / "run" / "drafters", tmp_path / "logs" / "a.jsonl"
    run = online_run(tmp_path, tiny_target, first, steps=2)
    serve(tiny_target, drafters, log, prompts(0, 24))
    run.learn_once()
    written = metrics(tmp_path / "run")
    write_as_an_older_version(tmp_path / "run")
    assert metrics(tmp_path / "run") == written
    assert status(tmp_path / "run")["routes"][""]["requests"] == 24
    write_online_report(tmp_path / "run", tmp_path / "report.html", title="t")
    resumed = online_run(tmp_path, tiny_target, first, steps=2)
    assert resumed.routes[""].counts == run.routes[""].counts
    for name, value in run.routes[""].learner.state()["drafter"].items():
        assert torch.equal(value, resumed.routes[""].learner.state()["drafter"][name]), name
    serve(tiny_target, drafters, log, prompts(0, 24, first=24))
    resumed.learn_once()
    assert [row["requests"] for row in metrics(tmp_path / "run")] == [24, 48]
    assert '"lane"' not in (tmp_path / "run" / "online" / "metrics.jsonl").read_text()
