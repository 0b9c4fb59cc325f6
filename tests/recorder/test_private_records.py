"""No part of a request or an answer can carry a secret into a record."""

from __future__ import annotations

import copy
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from drafttrain.data_gen.serving_logs.pseudonyms import SALT_FILE, Pseudonyms
from drafttrain.data_gen.serving_logs.redaction import redactor
from drafttrain.recorder.capture import Capture, line_of
from drafttrain.recorder.line_worker import LineWorker
from tests.data_gen.serving_logs.log_lines import chat, chat_encoder, ids, read

KEY = "gh" + "p_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
WEAK = "Sommer" + "2024x"
"""A password that only its key reveals."""
REDACT = redactor(builtin=True, own=None)


def line(request: dict[str, Any], response: dict[str, Any], **more: Any) -> str:
    capture = Capture(
        id="1",
        path=more.pop("path", "/v1/chat/completions"),
        request=json.dumps(request).encode(),
        response=json.dumps(response).encode(),
        streamed=False,
        time=0.0,
    )
    return line_of(capture, REDACT, **more).decode()


def called(arguments: Any) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "login", "arguments": arguments}}
    return {"message": {"role": "assistant", "content": "", "tool_calls": [call]}}


def turn(**turn: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"} | turn]}


def logged(*rows: tuple[str, ...]) -> dict[str, Any]:
    """Return log-probabilities: at each position, the answered token and alternatives."""
    content = [
        {
            "token": own,
            "logprob": -0.1,
            "bytes": list(own.encode()),
            "top_logprobs": [{"token": o, "logprob": -1.0, "bytes": list(o.encode())} for o in (own, *others)],
        }
        for own, *others in rows
    ]
    return {"logprobs": {"content": content}}


PIECES = [KEY[i : i + 5] for i in range(0, len(KEY), 5)]
REQUESTS = {
    "content": turn(content=f"my key is {KEY}"),
    "part of a content": turn(content=[{"type": "text", "text": f"password: {WEAK}"}]),
    "address of a picture": turn(content=[{"type": "image_url", "image_url": {"url": f"https://h.example/a?sig={WEAK}"}}]),
    "data of a file": turn(content=[{"type": "file", "file": {"file_data": WEAK, "filename": WEAK}}]),
    "name of a turn": turn(name=KEY),
    "other key of a turn": turn(metadata={"note": WEAK}),
    "arguments as text": {"messages": [{"role": "assistant", "content": "", **called(json.dumps({"password": WEAK}))["message"]}]},
    "arguments as an object": {"messages": [{"role": "assistant", "content": "", **called({"password": WEAK})["message"]}]},
    "arguments in arguments": turn(content=json.dumps({"body": json.dumps({"client_secret": WEAK})})),
    "answer of a tool": turn(role="tool", content=json.dumps([{"api_key": WEAK, "ok": True}])),
    "key of an object": turn(content=json.dumps({KEY: 1})),
    "name with _": turn(content=json.dumps({"db_user_password": WEAK})),
    "name in camel case": turn(content=json.dumps({"dbPassword": WEAK})),
    "name with -": turn(content=json.dumps({"x-api-key": WEAK})),
    "names in capitals": turn(content=json.dumps({"AWS_SECRET_ACCESS_KEY": WEAK})),
    "list under a name": turn(content=json.dumps({"passwords": [WEAK, "b"]})),
    "number under a name": turn(content=json.dumps({"card": 4111111111111111})),
    "default of a tool": {"tools": [{"function": {"name": "f", "parameters": {"properties": {"k": {"default": KEY}}}}}]},
    "secret of a tool": {"tools": [{"type": "mcp", "headers": {"Authorization": f"Bearer {KEY}"}, "password": WEAK}]},
    "description of a tool": {"functions": [{"name": "f", "description": f"uses password={WEAK}1!"}]},
    "template's argument": {"chat_template_kwargs": {"api_key": WEAK}},
    "template": {"chat_template": f"{{# {KEY} #}}"},
    "stop": {"stop": [KEY]},
    "model": {"model": f"m:{KEY}"},
    "metadata": {"metadata": {"who": WEAK}},
    "headers": {"extra_headers": {"X-Any": WEAK}},
    "unknown key": {"vault": {"value": WEAK}},
    "signed address": turn(content=f"see https://s.example/f?a=1&X-Amz-Signature={KEY}"),
    "login of an address": turn(content=f"see https://me:{WEAK}@s.example/f"),
}  # fmt: skip
CHOICES = {
    "answer": {"message": {"role": "assistant", "content": f"It is {KEY}."}},
    "thoughts": {"message": {"role": "assistant", "content": "a", "reasoning_content": f"the key {KEY}"}},
    "call": called(json.dumps({"token": WEAK})),
    "call as an object": called({"credentials": {"password": WEAK}}),
    "matched stop": {"stop_reason": KEY},
    "alternative in one token": logged(("a", KEY)),
    "alternative over tokens": logged(*(("a", piece) for piece in PIECES)),
    "third alternative": logged(*(("a", "b", piece) for piece in PIECES)),
    "older alternatives": {
        "logprobs": {
            "tokens": ["a"] * len(PIECES),
            "token_logprobs": [-0.1] * len(PIECES),
            "top_logprobs": [{"a": -0.1, piece: -2.0} for piece in PIECES],
        }
    },
    "other key of a choice": {"provider": {"note": WEAK}},
    "annotation": {"message": {"role": "assistant", "content": "a", "annotations": [{"url": WEAK}]}},
}
RESPONSES = {
    "header in an answer": {"headers": {"set-cookie": WEAK}},
    "fingerprint": {"system_fingerprint": KEY},
    "id": {"id": KEY},
    "other key": {"provider": WEAK},
    "log-probabilities of the prompt": {"prompt_logprobs": [{"1": {"decoded_token": WEAK}}]},
}


def check(text: str) -> None:
    assert WEAK not in text
    assert KEY not in text
    assert not any(piece in text for piece in PIECES if len(piece) == 5)
    assert json.dumps(list(PIECES[0].encode()), separators=(",", ":")) not in text
    assert "4111111111111111" not in text
    value = json.loads(text)
    assert value["response"]["choices"]


@pytest.mark.parametrize("place", REQUESTS)
def test_no_part_of_a_request_leaks_a_secret(place):
    asked = chat("q", "a")
    check(line(asked["request"] | REQUESTS[place], asked["response"]))


@pytest.mark.parametrize("place", CHOICES)
def test_no_part_of_an_answer_leaks_a_secret(place):
    asked = chat("q", "a", choice=copy.deepcopy(CHOICES[place]))
    check(line(asked["request"], asked["response"]))


@pytest.mark.parametrize("place", RESPONSES)
def test_no_part_outside_the_choices_leaks_a_secret(place):
    asked = chat("q", "a")
    check(line(asked["request"], asked["response"] | RESPONSES[place]))


@pytest.mark.parametrize("path", [f"/k/{WEAK}/v1/chat/completions", f"/v1/chat/completions?api_key={WEAK}"])
def test_only_the_endpoint_of_a_path_is_recorded(path):
    asked = chat("q", "a")
    text = line(asked["request"], asked["response"], path=path)
    check(text)
    assert json.loads(text)["path"] == "/v1/chat/completions"


def test_messages_without_secrets_are_recorded_unchanged():
    call = json.dumps({"path": "src/a.py", "max_tokens": 4096, "token": "eos_token", "limit": 1.5, "password": None})
    asked = chat("Fix token=tokenizer.eos_token_id", "a", choice=logged(("a", "b"), ("c",)))
    asked["request"] |= {"temperature": 0.5, "seed": 4821, "stop": ["###"], "tools": [{"function": {"name": "run"}}]}
    asked["request"]["messages"].insert(0, called(call)["message"])
    written = json.loads(line(asked["request"], asked["response"]))
    assert written["request"] == asked["request"]
    assert written["response"]["choices"][0]["message"] == asked["response"]["choices"][0]["message"]
    tops = written["response"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [one["token"] for one in tops] == ["a", "b"]


def test_alternatives_given_as_ids_are_checked_by_the_reader_with_a_tokenizer(tmp_path):
    def served(words: str) -> dict[str, Any]:
        own, other = ids("x" * len(words)), ids(words)
        rows = [{f"token_id:{a}": -0.1, f"token_id:{b}": -3.0} for a, b in zip(own, other, strict=True)]
        listed = {"tokens": [f"token_id:{a}" for a in own], "token_logprobs": [-0.1] * len(own), "top_logprobs": rows}
        return {
            "request": {"prompt": f"p{len(words)}"},
            "response": {"choices": [{"index": 0, "text": "x" * len(words), "logprobs": listed}]},
        }

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(served(words)) + "\n" for words in ("harmless words", KEY)))
    records, kinds = read(path, encoder=chat_encoder(max_length=128), near_duplicates=None)
    assert kinds == []
    assert [record.logged is not None for record in records] == [True, False]


def test_a_user_is_recorded_only_as_a_pseudonym(tmp_path):
    asked = chat("q", "a")
    text = line(asked["request"] | {"user": WEAK}, asked["response"], pseudonyms=Pseudonyms(tmp_path))
    check(text)
    assert json.loads(text)["request"]["user"] == Pseudonyms(tmp_path)(WEAK)


def test_pseudonyms_distinguish_users_within_a_folder_only_with_its_salt(tmp_path):
    a, b = Pseudonyms(tmp_path / "a"), Pseudonyms(tmp_path / "b")
    assert not (tmp_path / "a").exists()
    assert a("bob") == Pseudonyms(tmp_path / "a")("bob") != a("eve")
    assert a("bob") != b("bob")
    assert stat.S_IMODE((tmp_path / "a" / SALT_FILE).stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "a").iterdir()] == [SALT_FILE]
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: Pseudonyms(tmp_path / "c")("bob"), range(32)))) == 1


def test_the_line_worker_uses_the_salt_of_its_folder(tmp_path):
    asked = chat("q", "a")
    asked["request"]["user"] = "bob"
    capture = Capture(
        "1",
        "/v1/chat/completions",
        json.dumps(asked["request"]).encode(),
        json.dumps(asked["response"]).encode(),
        False,
        0.0,
    )
    worker = LineWorker(redact=True, redact_with=None, folder=tmp_path)
    try:
        written = json.loads(worker(capture))
    finally:
        worker.close()
    assert written["request"]["user"] == Pseudonyms(tmp_path)("bob")
    assert "user" not in json.loads(line_of(capture, REDACT))["request"]


def test_numbers_of_draft_tokens_are_recorded_instead_of_their_ids():
    choice = {
        "index": 0,
        "text": "ab",
        "speculative": {"drafted": [[7, 8], [9]], "accepted": [1, 0], "note": "a@b.example"},
    }
    capture = Capture(
        "1", "/v1/completions", b'{"prompt":"p"}', json.dumps({"choices": [choice]}).encode(), streamed=False, time=0.0
    )
    written = json.loads(line_of(capture, redactor(builtin=True, own=None)))
    assert written["response"]["choices"][0]["speculative"] == {"drafted": [2, 1], "accepted": [1, 0]}
    # Without redaction, the ids are recorded.
    assert json.loads(line_of(capture, None))["response"]["choices"][0] == choice


def test_rounds_of_a_redacted_text_are_not_recorded():
    def recorded(text: str) -> dict:
        choice = {"index": 0, "text": text, "speculative": {"drafted": [2, 1], "accepted": [1, 0]}}
        metrics = {"speculative_decoding": {"per_step_drafted": [2, 1], "per_step_accepted": [1, 0]}}
        body = json.dumps({"choices": [choice], "metrics": metrics}).encode()
        capture = Capture("1", "/v1/completions", b'{"prompt":"p"}', body, streamed=False, time=0.0)
        return json.loads(line_of(capture, redactor(builtin=True, own=None)))["response"]

    kept, changed = recorded("ask bob"), recorded("ask bob@mail.example")
    assert ("speculative" in kept["choices"][0], "speculative_decoding" in kept["metrics"]) == (True, True)
    assert ("speculative" in changed["choices"][0], "speculative_decoding" in changed["metrics"]) == (False, False)
