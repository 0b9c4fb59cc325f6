"""Lines are made in another process, which may die, hang or print without affecting other records."""

from __future__ import annotations

import json
import signal

import pytest

from drafttrain.data_gen.serving_logs.exchange import Refused
from drafttrain.recorder.capture import Capture
from drafttrain.recorder.line_worker import LineWorker
from tests.recorder import own_redaction


def capture(text: str) -> Capture:
    asked, answered = {"prompt": text}, {"choices": [{"text": " ok", "finish_reason": "stop"}]}
    return Capture("r", "/v1/completions", json.dumps(asked).encode(), json.dumps(answered).encode(), False, 0.0)


def test_a_worker_that_prints_or_dies_affects_no_other_record():
    worker = LineWorker(redact=True, redact_with=f"{own_redaction.__name__}.printing")
    try:
        assert (
            json.loads(worker(capture("I am Rumpelstilzchen, a@b.example")))["request"]["prompt"]
            == "I am [name], [e-mail]"
        )
        with pytest.raises(Refused, match="unreadable"):
            worker(capture("die"))
        assert json.loads(worker(capture("again")))["request"]["prompt"] == "again"
        with pytest.raises(Refused, match="not_json"):
            worker(Capture("r", "", b"{", b"{", False, 0.0))
    finally:
        worker.close()


def test_a_redaction_that_hangs_costs_one_record():
    worker = LineWorker(redact=True, redact_with=f"{own_redaction.__name__}.printing", max_seconds=1.0)
    try:
        with pytest.raises(Refused, match="unreadable"):
            worker(capture("hang"))
        worker.max_seconds = 60.0
        assert json.loads(worker(capture("again")))["request"]["prompt"] == "again"
    finally:
        worker.close()


def test_a_signal_to_the_process_group_costs_no_record():
    worker = LineWorker(redact=True, redact_with=None)
    try:
        worker(capture("first"))
        assert worker._process is not None
        worker._process.send_signal(signal.SIGTERM)
        assert json.loads(worker(capture("second")))["request"]["prompt"] == "second"
    finally:
        worker.close()
