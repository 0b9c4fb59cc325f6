"""OpenVINO as an engine: its steps add up to its totals, and it always decodes greedily."""

from __future__ import annotations

import json

import pytest

from drafttrain.serving.engines import Job, Use, engine_of
from drafttrain.serving.engines.openvino_worker import counters


def test_the_snippet_has_the_length_and_the_folders():
    code = engine_of("openvino").command("the/target", Use("the/drafter", "eagle3", 4, "greedy"))
    compile(code, "snippet", "exec")
    assert "num_assistant_tokens = 4" in code
    assert 'draft_model("the/drafter", "CPU")' in code
    compile(engine_of("transformers").command("a", Use("b", "causal_lm", 2, "sampled")), "snippet", "exec")


def test_rounds_are_counted_by_what_the_steps_gave():
    # 10 tokens, K = 3: the first alone, then 2 accepted, none, 3 accepted; the last is the target's own, without a draft.
    counted = {"num_drafts": 3, "num_draft_tokens": 9, "num_accepted": 5, "accepted_at": [2, 2, 1]}
    assert counters([1, 3, 1, 4, 1], (9, 5), 3, 10) == counted
    # A last round with all of its drafts accepted is missing in the totals.
    last = {"num_drafts": 3, "num_draft_tokens": 9, "num_accepted": 5, "accepted_at": [2, 2, 1]}
    assert counters([1, 3, 1, 4], (6, 2), 3, 9) == last


@pytest.mark.parametrize(
    ("steps", "totals", "max_tokens"),
    [
        ([1, 3, 1, 4, 1], (9, 4), 10),
        ([1, 3, 1, 4, 1], (8, 5), 10),
        ([1, 3, 1, 4, 1], (10, 5), 10),
        ([1, 3], (3, 2), 9),
        ([2, 3, 4], (6, 5), 9),
    ],
)
def test_steps_that_do_not_add_up_are_refused(steps, totals, max_tokens):
    with pytest.raises(RuntimeError, match="the steps have"):
        counters(steps, totals, 3, max_tokens)


def test_the_request_is_always_greedy(tmp_path, monkeypatch):
    engine = engine_of("openvino")
    monkeypatch.setattr(type(engine), "target_as", lambda self, folder, dtype=None: folder)
    job = Job(tmp_path, [[1, 2]], 8, [0.0, 1.0], "float32", 64)
    request = engine.request(job, Use("the/drafter", "causal_lm", 3, engine.draft("causal_lm", "sampled")))
    assert not engine.samples
    assert json.loads(json.dumps(request)) == {
        "target": str(tmp_path),
        "drafter": "the/drafter",
        "num_draft_tokens": 3,
        "dtype": "float32",
        "prompts": [[1, 2]],
        "max_tokens": [8],
        "warm_up": False,
    }
