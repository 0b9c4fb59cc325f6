"""Any line of a log is used, or quarantined with its reason; the cursor advances, and the next line is read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.data_gen.quarantine import read_items
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.serving_logs import ServingLogs
from drafttrain.data_gen.training_data import prepare
from drafttrain.recorder.intake import Intake
from tests.data_gen.serving_logs.log_lines import chat, chat_encoder, completion, ids, read, write

ENCODER = chat_encoder(max_length=64)
GOOD = completion("good", "line")

# ---------------------------------------------------------------- named lines that once stopped a reader

EMPTY = {"request": {"prompt": ""}, "response": {"choices": [{"index": 0, "text": "answer"}]}}
CRASHES = {
    "empty prompt": (EMPTY, "empty"),
    "empty prompt in a list": (EMPTY | {"request": {"prompt": [""]}}, "empty"),
    "completion and turns": ({"completion": "x", "messages": []}, "empty"),
    "completion and conversations": ({"completion": "x", "conversations": []}, "empty"),
    "completion and no prompt": ({"completion": "x", "messages": [{"role": "user", "content": "q"}]}, "empty"),
    "unhashable role": ({"conversations": [{"from": {}, "value": "x"}, {"from": "gpt", "value": "y"}]}, "unknown_role"),
    "a number beyond floats": (completion("p", "a", logprobs={"tokens": ["a"], "token_logprobs": [-(10**400)]}), None),
    "many role names": ({"messages": [{"role": "x" * 99, "content": ""}, {"role": "assistant", "content": "a"}]}, None),
}
VLLM = {
    "two spaces": "[1  2]",
    "no commas": "[1 2 3]",
    "cut": "[1, 2, ...]",
    "only a comma": "[,]",
    "negative": "[-1, 2]",
    "other digits": "[\u0661, \u0662]",
    "huge": "[99999999999]",
    "nested": "[[1], 2]",
}


def intake(folder: Path, **chosen: Any) -> Intake:
    return Intake(
        ServingLogsSettings(path=str(folder / "logs"), near_duplicates=None, **chosen), ENCODER, folder / "taken"
    )


def append(folder: Path, *lines: bytes) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    with (folder / "logs" / "a.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in lines)


def check_passed_over(folder: Path, line: bytes) -> str:
    """Return the kind of reason for a line between two good ones, which are read."""
    good = [json.dumps(GOOD | {"id": name}).encode() for name in ("before", "after")]
    good[1] = good[1].replace(b"good", b"other")
    append(folder, good[0], line, good[1])
    reader = intake(folder)
    while reader.take() is not None:
        pass
    assert [served.record.id for served in reader.served()][:: max(1, reader.counts["used"] - 1)] == ["before", "after"]
    again = intake(folder)
    assert again.take() is None
    assert again.counts == reader.counts
    assert again.num_lines == 3
    records, kinds = read(folder / "logs", near_duplicates=None)
    assert len(records) + len(kinds) >= 3
    return next((kind for kind in reader.counts if kind not in ("used", "announces")), "used")


@pytest.mark.parametrize("name", CRASHES)
def test_a_line_that_once_stopped_a_reader_is_quarantined(tmp_path, name):
    line, kind = CRASHES[name]
    found = check_passed_over(tmp_path, json.dumps(line).encode())
    assert found == kind or (kind is None and found != "unreadable")


@pytest.mark.parametrize("name", VLLM)
@pytest.mark.parametrize("of_prompt", [True, False])
def test_invalid_token_ids_of_vllm_are_quarantined(tmp_path, name, of_prompt):
    asked, answered = (VLLM[name], "[5]") if of_prompt else ("[5]", VLLM[name])
    lines = (
        f"INFO Received request r: prompt: 'p', params: x, prompt_token_ids: {asked}, lora: None",
        f"INFO Generated response r: output: 'a', output_token_ids: {answered}, finish_reason: stop",
    )
    append(tmp_path, *(line.encode() for line in lines))
    reader = intake(tmp_path)
    assert reader.take() == 0
    assert reader.counts["wrong_type"] + reader.counts["not_a_record"] == 1
    assert reader.num_lines == 2


def test_an_empty_prompt_has_the_start_tokens_of_the_tokenizer(tmp_path, tiny_tokenizer_with_start):
    start = tiny_tokenizer_with_start
    records, kinds = read(write(tmp_path / "a.jsonl", [EMPTY]), encoder=start)
    assert kinds == []
    assert records[0].tokens[0] == start.tokenizer.bos_token_id
    assert sum(records[0].loss_mask) == len(records[0].tokens) - 1


@pytest.fixture
def tiny_tokenizer_with_start() -> Any:
    from tokenizers.processors import TemplateProcessing

    encoder = chat_encoder()
    tokenizer = encoder.tokenizer
    start = tokenizer.eos_token
    tokenizer.bos_token = start
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.eos_token_id)]
    )
    return encoder


def test_prompts_for_new_answers_are_read_under_the_same_guard(tmp_path):
    chat_of_a_stranger = chat("q", "a")
    chat_of_a_stranger["request"]["chat_template_kwargs"] = {"tokenize": "word-of-a-stranger"}
    lines = [EMPTY, {"completion": "x", "messages": []}, chat_of_a_stranger, GOOD]
    source = ServingLogs(ServingLogsSettings(path=str(write(tmp_path / "a.jsonl", lines))))
    quarantine = tmp_path / "quarantine.jsonl"
    found = list(read_items(source, lambda item: source.prompts(item, ENCODER), quarantine, name="logs"))
    assert len(found) == 1
    assert len(quarantine.read_text().splitlines()) == 3
    assert "stranger" not in quarantine.read_text()


# ---------------------------------------------------------------- any line of a known dialect, with anything in any place

TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "a", "user", "assistant", "system", "tool", "stop", "<|end|>", "{{ 1 }}", "{% raise %}"]
    ),
    st.sampled_from(
        ["token_id:1", "token_id:-1", "token_id:" + "9" * 30, "x" * 9000, "\x00", "\ud800", "\u202e", "\ufeff"]
    ),
    st.text(max_size=12),
)
VALUES = st.recursive(
    st.one_of(
        TEXTS,
        st.none(),
        st.booleans(),
        st.integers(-3, 300),
        st.sampled_from([10**30, -(10**400), 2**31, 2**63, 1e308, -0.0, float("inf"), float("-inf"), float("nan")]),
        st.floats(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "text", "prompt", "messages", "type", "token", "logprob", "id"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)


def _tokens() -> dict[str, Any]:
    rows = [{f"token_id:{token}": -0.1, f"token_id:{token + 1}": -4.0} for token in ids("ok")]
    own = [f"token_id:{token}" for token in ids("ok")]
    return {"tokens": own, "token_logprobs": [-0.1] * len(own), "top_logprobs": rows}


def _dialects() -> list[dict[str, Any]]:
    """Return a line of each dialect with every field that is read."""
    chat_rows = [{"token": "o", "logprob": -0.1, "top_logprobs": [{"token": "k", "logprob": -3.0, "bytes": [107]}]}]
    full = chat("why", "ok", choice={"logprobs": {"content": chat_rows}, "stop_reason": None})
    full["request"] |= {"user": "u", "tools": [], "stop": ["x"], "chat_template_kwargs": {"enable_thinking": False}}
    full["response"] |= {"usage": {"prompt_tokens": 21, "completion_tokens": 3}}
    rounds = {"drafted": [ids("o"), 1], "accepted": [1, 0]}
    whole = completion(
        "p", "ok", logprobs=_tokens(), token_ids=ids("ok"), prompt_token_ids=ids("p"), speculative=rounds
    )
    metrics = {"speculative_decoding": {"per_step_drafted": [1], "per_step_accepted": [0]}}
    drafted = completion("q", "ok") | {"domain": "d", "id": "i"}
    drafted["response"] |= {"metrics": metrics}
    chunks = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "o"}, "token_ids": ids("o")}]},
        {"choices": [{"index": 0, "delta": {"content": "k"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}},
    ]
    batch = {"body": chat("b", "c")["request"], "response": {"status_code": 200, "body": chat("b", "c")["response"]}}
    about = {
        "finish_reason": {"type": "stop", "matched": 1},
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "output_token_logprobs": [[-0.1, ids("o")[0], "o"], [-0.1, ids("k")[0], "k"]],
        "output_top_logprobs": [[[-0.1, ids("o")[0], "o"]], [[-2.0, 7, "x"]]],
    }
    sglang = {
        "event": "request.finished",
        "rid": "r",
        "obj": {"text": "p", "input_ids": ids("p"), "sampling_params": {"stop": None}},
        "out": {"text": "ok", "output_ids": ids("ok"), "meta_info": about},
    }
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    return [
        full, whole, drafted, batch, sglang,
        {"request": {"messages": [{"role": "user", "content": parts}]}, "response": chunks},
        {"prompt": [1, 2], "choices": [{"index": 0, "text": "ok"}], "chunks": []},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}], "tools": []},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 3},
        {"prompt": "a", "completion": "b", "model": "m", "user": "u"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
    ]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inside for place in _places(part, (*path, key)))]


DIALECTS = _dialects()
PLACES = [[place for place in _places(line) if place] for line in DIALECTS]


@st.composite
def json_lines(draw: st.DrawFn) -> bytes:
    """Return a line of a dialect with up to three places changed, removed or renamed."""
    number = draw(st.integers(0, len(DIALECTS) - 1))
    line = copy.deepcopy(DIALECTS[number])
    for place in draw(st.lists(st.sampled_from(PLACES[number]), max_size=3)):
        part: Any = line
        try:
            for key in place[:-1]:
                part = part[key]
            change = draw(st.sampled_from(["value", "value", "gone", "name"]))
            if change == "value":
                part[place[-1]] = draw(VALUES)
            else:
                gone = part.pop(place[-1])
                if change == "name" and isinstance(part, dict):
                    part[
                        draw(st.sampled_from(["messages", "prompt", "completion", "choices", "response", "event"]))
                    ] = gone
        except (TypeError, KeyError, IndexError, AttributeError):
            continue  # An earlier change removed this place.
    return json.dumps(line, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def vllm_lines(draw: st.DrawFn) -> bytes:
    """Return a request or an answer of vLLM's log in which something may be another text."""
    quoted = st.one_of(
        st.sampled_from(["None", "'p'", '"it\'s"', "'\\x'", "'\\N{x}'", "'\\ud800'", "b'x'"]), TEXTS.map(repr)
    )
    listed = st.one_of(
        st.sampled_from(["None", "[]", "[1, 2]", *VLLM.values()]), st.lists(st.integers()).map(str), st.text(max_size=8)
    )
    name = draw(st.sampled_from(["r", "s-0", "\u00e9"]))
    form = draw(
        st.sampled_from(
            [
                "INFO Received request {name}: prompt: {quoted}, params: P(a=[1]), prompt_token_ids: {listed}, lora: None.",
                "Request {name} details: prompt: {quoted}, prompt_token_ids: {listed}, prompt_embeds shape: None.",
                "Received request {name}: params: P()",
                "Generated response {name}: output: {quoted}, output_token_ids: {listed}, finish_reason: stop",
                "Generated response {name} (streaming complete): output: {quoted}, output_token_ids: {listed}, finish_reason: x",
                "Generated response {quoted}{listed}",
            ]
        )
    )
    line = form.format(name=name, quoted=draw(quoted), listed=draw(listed))
    return line.encode("utf-8", "surrogatepass").replace(b"\n", b" ")


@st.composite
def damaged_lines(draw: st.DrawFn) -> bytes:
    """Return a line with bytes put into it, or cut off."""
    line = draw(st.one_of(json_lines(), vllm_lines()))
    at = draw(st.integers(0, len(line)))
    return line[:at] + draw(st.binary(max_size=4)).replace(b"\n", b"") + line[at : draw(st.integers(at, len(line)))]


LINES = st.one_of(
    json_lines(), json_lines(), json_lines(), vllm_lines(), damaged_lines(), VALUES.map(json.dumps).map(str.encode)
)


def check_any_line(folder: Path, cases: int) -> None:
    append(folder, json.dumps(GOOD).encode())
    readers = [intake(folder)]
    assert readers[0].take() == 1
    expected = 1

    @settings(max_examples=cases)
    @given(LINES)
    def every_line(line: bytes) -> None:
        nonlocal expected
        reader = readers[0]
        append(folder, line)
        expected += bool(line.strip())
        before, used = reader.num_batches, reader.counts["used"]
        taken = reader.take()
        assert taken is not None
        assert reader.num_lines == expected
        assert (taken > 0) == (reader.counts["used"] > used)
        for served in reader.served(first_batch=before):
            record = served.record
            assert 1 < len(record.tokens) <= 64
            assert any(record.loss_mask)
            assert not record.loss_mask[0]
            assert all(0 <= token < ENCODER.size for token in record.tokens)
        written = folder / "taken" / f"quarantine-{before:08d}.jsonl"
        reasons = [json.loads(entry)["reason"] for entry in written.open()] if written.exists() else []
        assert all(reason.partition(": ")[2] for reason in reasons)
        # The guard is the last resort: known malformed lines have their own reasons.
        assert not any(reason.startswith("unreadable") for reason in reasons), reasons

    every_line()
    assert intake(folder).counts == readers[0].counts


def test_any_line_is_used_or_quarantined_with_its_reason(tmp_path):
    check_any_line(tmp_path, 250)


@pytest.mark.slow
def test_ten_thousand_lines_are_used_or_quarantined_with_their_reasons(tmp_path):
    check_any_line(tmp_path, 10_000)


def test_gen_continues_after_any_of_these_lines(tmp_path):
    path = write(tmp_path / "log.jsonl", [*(line for line, _ in CRASHES.values()), GOOD])
    found = ServingLogsSettings(path=str(path), near_duplicates=None)
    data = prepare(
        DataSettings(sources=[found]),
        tmp_path / "data",
        tokenizer=ENCODER.tokenizer,
        tokenizer_fingerprint="x",
        seed=0,
    )
    accounted = len(data.stores[0]) + sum(data.stores[0].meta["set_aside_by"].values())
    assert accounted >= len(CRASHES) + 1
