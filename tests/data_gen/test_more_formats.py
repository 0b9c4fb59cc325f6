"""Further forms in which people have data: each item is read right, or refused with its reason and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import DataError
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.sources import RecordSettings
from drafttrain.data_gen.sources.openai_batch import OpenAIBatch, OpenAIBatchSettings
from drafttrain.data_gen.sources.parquet import Parquet, ParquetSettings
from drafttrain.data_gen.stored.records import open_store
from drafttrain.data_gen.token_text import token_texts
from tests.data_gen.chats import CHATML, RICH, chat_encoder, chat_tokenizer, read
from tests.data_gen.four_templates import TEMPLATES

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
ASKED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
PLAIN = ASKED + "[[a<|im_end|>]]\n"
UNTRAINED = ASKED + "a<|im_end|>\n"


@pytest.mark.parametrize(
    "turns",
    [
        json.dumps([USER, ANSWER]),
        {"role": ["user", "assistant"], "content": ["q", "a"]},
        {"from": ["human", "gpt"], "value": ["q", "a"], "tool_calls": [None, None]},
    ],
)
def test_turns_are_read_from_json_text_and_from_columns(turns):
    assert read(chat_encoder(RICH), {"messages": turns}) == [PLAIN]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("[{", "messages: not JSON"),
        ('"q"', "messages: must be a list of turns"),
        ({"role": ["user"], "content": ["q", "a"]}, "messages: a mapping must hold lists of equal length"),
        ({"role": "user", "content": "q"}, "messages: a mapping must hold lists of equal length"),
        ({}, "messages: a mapping must hold lists of equal length"),
    ],
)
def test_broken_turns_are_refused(turns, reason):
    with pytest.raises(BadItem, match=reason):
        read(chat_encoder(RICH), {"messages": turns})


def test_rename_reads_keys_inside_a_mapping_and_its_other_keys_are_not_lost():
    settings = RecordSettings(rename={"messages": "data.talk.turns"})
    assert settings.check() == []
    coder = chat_encoder(RICH).reading_as(settings)
    inside = {"talk": {"turns": [USER, ANSWER], "language": "en"}, "source": "web"}
    assert read(coder, {"data": inside}) == [PLAIN]
    with pytest.raises(BadItem, match=r"unknown key 'data\.mood'"):
        read(coder, {"data": inside | {"mood": "x"}})
    with pytest.raises(BadItem, match=r"rename names 'data\.talk\.turns', which it lacks"):
        read(coder, {"data": {"talk": []}})
    ignoring = RecordSettings(rename={"messages": "data.talk.turns"}, ignore_keys=["data.mood"])
    assert read(chat_encoder(RICH).reading_as(ignoring), {"data": inside | {"mood": "x"}}) == [PLAIN]


def test_a_nested_table_is_read_as_its_lines_are(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    rows = [{"data": {"turns": turns, "tools": [{"name": "f"}]}}, {"data": {"turns": [USER, ANSWER], "tools": None}}]
    kwargs = pa.array([[("enable_thinking", True)], None], pa.map_(pa.string(), pa.bool_()))
    table = pa.Table.from_pylist(rows).append_column("chat_template_kwargs", kwargs)
    pq.write_table(table, tmp_path / "t.parquet")
    settings = ParquetSettings(
        path=str(tmp_path / "t.parquet"), rename={"messages": "data.turns", "tools": "data.tools"}
    )
    coder = chat_encoder(RICH).reading_as(settings)
    found = [read(coder, item.value) for item in Parquet(settings).items()]
    assert found == [read(coder, rows[0] | {"chat_template_kwargs": {"enable_thinking": True}}), [PLAIN]]
    assert '[[<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>]]' in found[0][0]


def test_a_map_with_a_key_twice_stops_with_its_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    twice = pa.array([[("x", 1), ("x", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": ["t"], "metadata": twice}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: from row 0: a map holds a key twice"):
        list(Parquet(ParquetSettings(path=str(tmp_path / "t.parquet"))).items())


def asked(name: str, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [USER]} | body,
    }


def answered(name: str, *choices: Any, status: int = 200, error: Any = None) -> dict[str, Any]:
    body = {"id": "c", "object": "chat.completion", "choices": list(choices), "usage": {"total_tokens": 3}}
    return {
        "id": "b",
        "custom_id": name,
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": error,
    }


def choice(finish: str = "stop", **message: Any) -> dict[str, Any]:
    whole = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": []} | message
    return {"index": 0, "message": whole, "finish_reason": finish, "logprobs": None}


def batch(folder: Path, requests: list[Any], outputs: list[Any]) -> OpenAIBatchSettings:
    for name, lines in (("in", requests), ("out", outputs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return OpenAIBatchSettings(path=str(folder / "out.jsonl"), requests=str(folder / "in.jsonl"))


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_outputs_of_a_batch_job_are_joined_with_their_requests(tmp_path):
    history = [USER, ANSWER, USER | {"content": [{"type": "text", "text": "q"}]}]
    requests = [
        asked("one", temperature=0.7),
        asked("call", tools=[{"type": "function", "function": {"name": "f"}}]),
        asked("two", messages=history, n=2),
        {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "p"}},
        asked("think"),
    ]
    outputs = [
        answered("think", choice(reasoning_content="hm")),
        answered("two", choice(), choice(content="b")),
        answered("call", choice("tool_calls", content=None, tool_calls=[CALL])),
        answered("one", choice()),
        answered("text", {"index": 0, "text": "c", "finish_reason": "stop"}),
    ]
    coder = chat_encoder(RICH)
    items = list(OpenAIBatch(batch(tmp_path, requests, outputs)).items())
    assert [item.problem for item in items] == [""] * 6
    assert [item.value["id"] for item in items] == ["think", "two@0", "two@1", "call", "one", "text"]
    texts = [text for item in items for text in read(coder, item.value)]
    system = '<|im_start|>system\nTools: {"type": "function", "function": {"name": "f"}};<|im_end|>\n'
    assert texts == [
        ASKED + "[[<think>hm</think>a<|im_end|>]]\n",
        UNTRAINED + PLAIN,
        UNTRAINED + PLAIN.replace("[[a", "[[b"),
        system + ASKED + '[[<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>]]\n',
        PLAIN,
        "p[[c<|im_end|>]]",
    ]


def test_outputs_that_are_no_complete_answers_are_counted_with_their_reasons(tmp_path):
    names = ["ok", "length", "failed", "error", "empty", "refused", "stops", "twice"]
    requests = [asked(name, **({"stop": ["x"]} if name == "stops" else {})) for name in names]
    outputs = [
        answered("ok", choice()),
        answered("length", choice("length")),
        answered("failed", choice(), status=500),
        answered("error", error={"code": "x"}),
        answered("empty"),
        answered("refused", choice(content=None, refusal="no")),
        answered("stops", choice()),
        answered("twice", choice()),
        answered("twice", choice()),
        answered("stranger", choice()),
        {"messages": [USER, ANSWER]},
    ]
    settings = batch(tmp_path, requests, outputs)
    problems = [item.problem.partition(":")[0] for item in OpenAIBatch(settings).items()]
    assert problems == [
        "", "finish_reason", "response", "response", "response.body.choices", "refusal", "body.stop", "", "custom_id",
        "custom_id", "custom_id",
    ]  # fmt: skip
    store = open_store(
        tmp_path / "s", OpenAIBatch(settings), chat_encoder(RICH), about={"source": {"kind": "openai_batch"}}
    )
    assert (len(store), store.meta["items"], store.meta["set_aside"]) == (2, 11, 9)
    with pytest.raises(BadItem, match="source kind openai_batch reads outputs of batch jobs"):
        read(chat_encoder(RICH), outputs[0])


@pytest.mark.parametrize("line", [asked("ok"), {"custom_id": "x"}, [1]])
def test_requests_that_cannot_be_joined_stop_with_their_line(tmp_path, line):
    settings = batch(tmp_path, [asked("ok"), line], [answered("ok", choice())])
    with pytest.raises(DataError, match=r"in\.jsonl:2: "):
        list(OpenAIBatch(settings).items())


SEVERAL = [USER, ANSWER, USER, ANSWER, USER, ANSWER | {"content": "b"}, USER]


def test_only_the_last_answer_is_a_label_if_the_source_wants_that():
    (text,) = read(chat_encoder(CHATML, answers="last"), {"messages": SEVERAL})
    last = PLAIN.replace("[[a", "[[b") + "<|im_start|>user\nq<|im_end|>\n"
    assert text == UNTRAINED * 2 + last
    assert read(chat_encoder(CHATML), {"messages": SEVERAL}) == [PLAIN * 2 + last]
    with pytest.raises(BadItem, match="no token of the first"):
        read(chat_encoder(CHATML, answers="last"), {"messages": [*SEVERAL[:5], ANSWER | {"weight": 0}]})


def test_arguments_of_the_template_are_the_sources_unless_the_record_has_its_own():
    thinking = TEMPLATES["thinking"]
    coder = chat_encoder(thinking.source, chat_template_kwargs=thinking.arguments)
    silent = ASKED + "<think>\n\n</think>\n\n[[a<|im_end|>]]\n"
    assert read(coder, {"messages": [USER, ANSWER]}) == [silent]
    own = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": True}}
    assert read(coder, own) == [ASKED + "[[<think>\n\n</think>\n\na<|im_end|>]]\n"]
    ((_, tokens),) = coder.prompts({"question": "q"}, id="x", prompt_tokens=None)
    assert coder.tokenizer.decode(tokens) == silent.partition("[[")[0]


def test_the_texts_of_tokens_joined_are_the_text_and_characters_stay_whole():
    tokenizer = chat_tokenizer(CHATML)
    words = "<|im_start|>naïve 😀\n<|im_end|> end"
    tokens = tokenizer(words, add_special_tokens=False).input_ids
    mask = [place > 4 for place in range(len(tokens))]
    pieces = list(token_texts(tokenizer, tokens, mask))
    assert "".join(text for text, _, _ in pieces) == words
    assert [token for _, _, ids in pieces for token in ids] == tokens
    assert [len(ids) for text, _, ids in pieces if text == "😀"] == [4]
    # A mask that cuts a character shows that it does, and no token gets another's flag.
    cut = [place >= tokens.index(tokens[9]) + 3 for place in range(len(tokens))]
    assert all(
        len({cut[first + i] for i in range(len(ids))}) == 1 for _, first, ids in token_texts(tokenizer, tokens, cut)
    )
