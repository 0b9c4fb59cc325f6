"""A line gives the same record, or the same reason, whether its file is read once (the source) or followed (the intake)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.texts import Record
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.serving_logs.duplicates import Mark
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.sources import content_of
from drafttrain.recorder.intake import Intake, Served, served_as_json
from tests.data_gen.serving_logs.log_lines import chat, chat_encoder, completion, ids, read, write

LONG_TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
SGLANG = {
    "event": "request.finished",
    "rid": "s",
    "obj": {"text": "asked", "input_ids": ids("asked")},
    "out": {"text": "ab", "output_ids": ids("ab"), "meta_info": {"finish_reason": {"type": "length"}}},
}
LOGPROBS = {"tokens": ["a", "b"], "token_logprobs": [-0.1, -0.2], "top_logprobs": [{"c": -3.0}, {"d": -2.0}]}
LINES: dict[str, list[Any]] = {
    "a chat": [chat("q", "a")],
    "a chat whose user is named": [
        chat("q", "a") | {"request": chat("q", "a")["request"] | {"user": "ann@example.com"}}
    ],
    "a completion": [completion("p", "a")],
    "several answers": [{"prompt": "p", "choices": [{"text": "a"}, {"text": "b"}, {"text": "a"}]}],
    "logged distribution": [completion("p", "ab", logprobs=LOGPROBS)],
    "rounds": [completion("p", "abc", speculative={"drafted": [2, 2], "accepted": [1, 0]})],
    "a dump": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    "SGLang": [SGLANG],
    "vLLM in two lines": [
        "Received request r: prompt: 'asked', params: x, prompt_token_ids: None",
        "Generated response r: output: 'answer', output_token_ids: None, finish_reason: length",
    ],
    "private text": [chat("mail bob@corp.example", "his phone is +49 30 901820")],
    "private ids": [completion("p", None, token_ids=ids("bob@corp.example"))],
    "nothing left of the answer": [chat("q", "bob@corp.example")],
    "a duplicate": [chat("q", "a"), chat("q", "a")],
    "a near duplicate": [completion(LONG_TEXT, LONG_TEXT), completion(LONG_TEXT, f"{LONG_TEXT} .")],
    "a duplicate of one that gave no record": [completion("x" * 999, "same"), completion("x" * 999, "same")],
    "another model": [chat("q", "a"), chat("r", "b") | {"response": chat("r", "b")["response"] | {"model": "other"}}],
    "a chat that the template refuses": [
        {"messages": [{"role": "bad", "content": "q"}, {"role": "assistant", "content": "a"}]}
    ],
    "a line over the limit": ['{"prompt": "' + "x" * 5000 + '"}', chat("q", "a")],
    "not UTF-8": [b"\xff", chat("q", "a")],
    "not JSON": ["{", chat("q", "a")],
    "an empty line": ["", "  ", chat("q", "a")],
    "too deep": ["[" * 99 + "]" * 99, '{"a": ' * 99 + "1" + "}" * 99],
    "longer than a record": [chat("q", "a" * 300), chat("q" * 300, "a")],
}
SETTINGS = {"max_line_mb": 0.004}


def encoder() -> Encoder:
    made = chat_encoder()
    made.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + made.tokenizer.chat_template
    )
    return made


def once(path: Path) -> tuple[list[Record], list[str]]:
    return read(path, encoder=encoder(), **SETTINGS)


def followed(path: Path, folder: Path) -> tuple[list[Record], list[str]]:
    intake = Intake(ServingLogsSettings(path=str(path), **SETTINGS), encoder(), folder)
    while intake.take() is not None:
        pass
    reasons = [
        json.loads(line)["reason"].partition(":")[0]
        for file in sorted(folder.glob("quarantine-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return [served.record for served in intake.served()], reasons


def as_json(records: list[Record]) -> list[str]:
    return [json.dumps(served_as_json(Served(record, "", Mark("", "")))) for record in records]


@pytest.mark.parametrize("name", LINES)
def test_a_line_gives_the_same_record_or_reason_both_ways(tmp_path, name):
    path = write(tmp_path / "log.jsonl", LINES[name])
    records, reasons = once(path)
    other_records, other_reasons = followed(path, tmp_path / "taken")
    assert records or reasons
    assert as_json(records) == as_json(other_records)
    assert reasons == other_reasons


def test_all_lines_together_give_the_same_records_and_reasons_both_ways(tmp_path):
    path = write(tmp_path / "log.jsonl", [line for lines in LINES.values() for line in lines])
    records, reasons = once(path)
    other_records, other_reasons = followed(path, tmp_path / "taken")
    assert len(records) > 8
    assert as_json(records) == as_json(other_records)
    assert reasons == other_reasons
    assert {"duplicate", "near_duplicate", "redacted", "template", "too_long", "wrong_model"} <= set(reasons)


def test_the_cut_last_line_of_a_packed_file_is_quarantined_both_ways(tmp_path):
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(chat("q", "a")).encode() + b'\n{"request": '))
    assert once(path)[1] == followed(path, tmp_path / "taken")[1] == ["not_json"]


def test_a_last_line_that_is_still_written_is_in_neither(tmp_path):
    path = write(tmp_path / "log.jsonl", [chat("q", "a")])
    with path.open("a") as file:
        file.write('{"request": ')
    assert once(path)[1] == followed(path, tmp_path / "taken")[1] == []
    assert len(once(path)[0]) == 1


def test_a_renamed_setting_keeps_the_content_of_older_stores():
    """Else the intake of an older online run would refuse to continue, and older stores would be encoded again."""
    content = content_of(ServingLogsSettings(path="logs", logprobs=False))
    assert content["law"] is False
    assert "logprobs" not in content
