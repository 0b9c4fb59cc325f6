"""Chats in the forms of data sets: every key is read or quarantines the record; labels are what the target writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.errors import DataError
from drafttrain.core.texts import Record
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources import RecordSettings
from drafttrain.data_gen.sources.hub import Hub, HubSettings
from drafttrain.data_gen.sources.jsonl import JSONLSettings, lines
from drafttrain.data_gen.sources.parquet import Parquet, ParquetSettings
from drafttrain.data_gen.training_data import prepare
from tests.data_gen.chats import ASKS, BOS, CHATML, GENERATION, RICH, chat_encoder, chat_tokenizer, read, shown

ASKED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
PLAIN = ASKED + "[[a<|im_end|>]]\n"
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALLS = [{"function": {"name": "f", "arguments": '{"x": 1}'}}]
CALL = '<call>{"name": "f", "arguments": {"x": 1}}</call>'
TOOL = {"name": "f", "description": "d"}
TOOLS = '<|im_start|>system\nTools: {"type": "function", "function": {"name": "f", "description": "d"}};<|im_end|>\n'
KWARGS = "{% if enable_thinking %}<think>{% endif %}" + CHATML


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (chat(USER, ANSWER, tools=[TOOL]), TOOLS + PLAIN),
        (chat(USER, ANSWER, tools=json.dumps([{"type": "function", "function": TOOL}])), TOOLS + PLAIN),
        (chat(USER, ANSWER, functions=[TOOL]), TOOLS + PLAIN),
        (chat(USER, ANSWER, tools=None, system="", source="web", score=0.5, _row=3, odd=None, empty=[]), PLAIN),
        (chat(USER, {"role": "assistant", "content": None, "tool_calls": CALLS}), ASKED + f"[[{CALL}<|im_end|>]]\n"),
        (
            chat(USER, {"role": "assistant", "content": "a", "function_call": CALLS[0]["function"]}),
            ASKED + f"[[a{CALL}<|im_end|>]]\n",
        ),
        (
            chat(USER, {"role": "assistant", "reasoning": "hm", "content": "a"}),
            ASKED + "[[<think>hm</think>a<|im_end|>]]\n",
        ),
        (chat(USER, ANSWER | {"weight": 1.0, "train": True}), PLAIN),
        (chat(USER | {"loss": True}, ANSWER), PLAIN),
        (
            chat(USER | {"content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}, ANSWER),
            PLAIN.replace("q", "q\nr"),
        ),
        ({"conversations": [{"role": "User", "content": "q"}, {"from": "GPT", "value": "a"}]}, PLAIN),
        ({"prompt": [USER], "completion": [ANSWER]}, PLAIN),
        ({"prompt": "q", "completion": "a", "chat": True}, PLAIN),
        ({"prompt": "q", "messages": [USER, ANSWER], "prompt_id": "7"}, PLAIN),
        ({"question": "q", "answer": "a"}, PLAIN),
        ({"instruction": "q", "input": "", "output": "a"}, PLAIN),
        (
            {"instruction": "q", "output": "a", "history": [["q", "a"]], "system": "s"},
            "<|im_start|>system\ns<|im_end|>\n" + PLAIN + PLAIN,
        ),
    ],
)
def test_a_record_is_read_by_all_its_keys(value, text):
    coder = chat_encoder(RICH)
    assert read(coder, value) == [text]
    ((_, tokens),) = coder.prompts(value, id="x", prompt_tokens=None)
    # The prompt of a record is the text before its last answer in training.
    assert coder.tokenizer.decode(tokens) == text.replace("]]", "").rpartition("[[")[0].replace("[[", "")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (chat(USER, ANSWER, mask_history=True), "unknown key 'mask_history': it may change.* ignore_keys"),
        (chat(USER, ANSWER | {"train_detail": [1]}), r"unknown key 'train_detail' of messages\.1"),
        (chat(USER, ANSWER | {"weight": 0.5}), r"messages\.1\.weight: must be 0, 1, true or false, got 0\.5"),
        (chat(USER, ANSWER | {"weight": 0}), "no token of the first"),
        (chat(USER, ANSWER, text="q a"), "messages and text: more than one text"),
        (chat({"role": "system", "content": "s"}, USER, ANSWER, system="t"), "two system prompts that differ"),
        (chat(USER | {"content": [{"type": "image_url", "image_url": "x"}]}, ANSWER), r"messages\.0\.content\.0: has type 'image_url'"),
        (chat(USER | {"tool_calls": CALLS}, ANSWER), "the role 'user' cannot call tools"),
        (chat(USER, ANSWER, tools="[{"), "tools: not JSON"),
        (chat(USER, ANSWER, tools=["f"]), "tools: must be a list of mappings"),
        (chat(USER, ANSWER, chat_template_kwargs={"chat_template": "x"}), "chat_template: is not an argument"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]}, "content: not JSON"),
        ({"prompt": "q", "completion": "a", "tools": [TOOL]}, "tools: no template reads it"),
        ({"prompt": "q", "completion": "a", "response": "b"}, "completion and response"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels: .*shifted\?"),
        ({"input_ids": [1, True]}, "must be a list of integers"),
        ({"tokens": [1, 2], "loss_mask": [1, 0.5]}, "must hold flags"),
    ],
)  # fmt: skip
def test_unknown_content_is_quarantined_by_its_name(value, reason):
    with pytest.raises(BadItem, match=reason):
        read(chat_encoder(RICH), value)


def test_the_recipe_names_roles_keys_and_what_to_ignore():
    settings = RecordSettings(roles={"wizard": "assistant"}, rename={"messages": "dialog"}, ignore_keys=["mood"])
    assert settings.check() == []
    coder = chat_encoder(RICH).reading_as(settings)
    spoken = {"dialog": [USER | {"mood": "x"}, {"role": "wizard", "content": "a"}], "mood": "y"}
    assert read(coder, spoken) == [PLAIN]
    problems = RecordSettings(roles={"wizard": "mage"}, rename={"mesages": "dialog"}).check()
    assert [problem.partition(". Known")[0] for problem in problems] == [
        "rename: 'mesages' is not a key of a record",
        "roles: 'wizard': 'mage' is not a role",
    ]


def test_arguments_of_the_template_reach_it():
    value = chat(USER, ANSWER, chat_template_kwargs={"enable_thinking": True})
    assert read(chat_encoder(KWARGS), value) == ["<think>" + PLAIN]


@pytest.mark.parametrize("lost", ["tool_calls", "reasoning_content"])
def test_a_template_that_leaves_out_what_the_target_wrote_is_refused(lost):
    part = {"tool_calls": CALLS, "reasoning_content": "hm"}[lost]
    with pytest.raises(BadItem, match=f"leaves out '{lost}' of an answer"):
        read(chat_encoder(CHATML), chat(USER, ANSWER | {lost: part}))
    # Parts of the prompt that a template does not read, the target does not read either.
    assert read(chat_encoder(CHATML), chat(USER, ANSWER, tools=[TOOL])) == [PLAIN]


def test_an_untrained_answer_is_read_and_not_a_label():
    untrained = ANSWER | {"content": "bad", "loss": 0}
    (text,) = read(chat_encoder(RICH), chat(USER, untrained, USER, ANSWER))
    assert text == PLAIN.replace("[[a", "bad").replace("]]", "") + PLAIN


REWRITES = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] }}|{% endgeneration %}{% else %}"
    "{{ m['content'] }}|{% endif %}{% endfor %}{% if add_generation_prompt %}A:<think>{% endif %}"
)


def test_the_templates_marks_are_trained_only_where_prompts_do_not_show_the_answer():
    coder = chat_encoder(REWRITES)
    assert read(coder, chat(USER, ANSWER, USER, ANSWER | {"weight": 0})) == ["q|A: [[a|]]q|A: a|"]
    assert [("marks are trained" in note, count) for note, count in coder.notes.items()] == [(True, 1)]
    with pytest.raises(BadItem, match="the assistant's tokens are unclear"):
        read(
            chat_encoder(REWRITES.replace("{% generation %}", "").replace("{% endgeneration %}", "")),
            chat(USER, ANSWER),
        )
    wrong = REWRITES.replace("{{ m['content'] }}|{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}|")
    with pytest.raises(BadItem, match="the assistant's tokens are unclear"):
        read(chat_encoder(wrong), chat(USER, ANSWER))


def test_marks_without_the_end_of_an_answer_are_reported():
    short = GENERATION.replace("<|im_end|>{%- endgeneration %}", "{%- endgeneration %}<|im_end|>")
    coder = chat_encoder(short)
    assert read(coder, chat(USER, ANSWER)) == [PLAIN]
    assert list(coder.notes.values()) == [1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"text": "hi"}, "[[<s>hi<|im_end|>]]"),
        ({"text": "<s>hi"}, "[[<s>hi<|im_end|>]]"),
        ({"text": "<s>hi<|im_end|>"}, "[[<s>hi<|im_end|>]]"),
        ({"text": "hi<|im_end|>\n"}, "[[<s>hi<|im_end|>\n]]"),
        ({"prompt": "hi", "completion": "yo<|im_end|>\n"}, "<s>hi[[yo<|im_end|>]]\n"),
        ({"prompt": "<s>hi", "response": "yo"}, "<s>hi[[yo<|im_end|>]]"),
    ],
)
def test_special_tokens_are_added_only_where_they_are_missing(value, text):
    assert read(chat_encoder(BOS, bos=True), value) == [text]
    assert read(chat_encoder(None, bos=True), value) == [text]


def test_end_tokens_of_the_tokenizer_end_no_prompt_and_no_text_twice():
    from tokenizers import processors

    tokenizer = chat_tokenizer(None)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    coder = Encoder(tokenizer, 100)
    assert read(coder, {"text": "hi"}) == ["[[hi<|im_end|>]]"]
    assert read(coder, {"prompt": "hi", "completion": "yo"}) == ["hi[[yo<|im_end|>]]"]
    ((_, tokens),) = coder.prompts({"prompt": "hi"}, id="x", prompt_tokens=None)
    assert tokenizer.decode(tokens) == "hi"


def test_a_rendered_chat_gets_no_start_token_beyond_its_template():
    (text,) = read(chat_encoder(CHATML, bos=True), {"text": "<|im_start|>user\nq<|im_end|>\n"})
    assert text == "[[<|im_start|>user\nq<|im_end|>\n]]"


def test_a_prompt_of_text_is_read_without_a_template_in_every_kind_of_record():
    coder = chat_encoder(CHATML)
    (record,) = coder.records({"prompt": "q", "completion": "a"}, id="x")
    for value in ({"prompt": "q"}, {"prompt": "q", "completion": "a"}, {"prompt": "q", "answer": "7"}):
        ((_, tokens),) = coder.prompts(value, id="x", prompt_tokens=None)
        assert tokens == list(record.tokens[: len(tokens)]) == coder.raw.begun("q")
    assert list(coder.notes.values()) == [4]
    ((_, tokens),) = coder.prompts({"turns": ["q", "more"], "question_id": 81}, id="x", prompt_tokens=None)
    assert coder.tokenizer.decode(tokens) == ASKED


def test_rows_of_ids_are_read_with_their_labels_and_without_their_padding():
    coder = chat_encoder(None)
    rows = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}
    (record,) = coder.records(rows, id="x")
    assert record == Record("x", [5, 6, 7], [False, True, True])
    (record,) = coder.records({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, id="x")
    assert record.loss_mask == [False, False, True]


ROWS = [chat(USER, ANSWER, tools=[TOOL]), chat(USER, ANSWER | {"tool_calls": CALLS})]


def test_rows_of_a_table_are_read_as_lines_are(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    coder = chat_encoder(RICH)
    wanted = [read(coder, row) for row in ROWS]
    for source in (Parquet(ParquetSettings(path=str(folder / "train.parquet"))), Hub(HubSettings(path=str(folder)))):
        assert [read(coder, item.value) for item in source.items()] == wanted


@pytest.mark.parametrize("end", ["", ", {", ", {}", "]]"])
def test_a_broken_array_stops_with_its_line(tmp_path, end):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one"},\n {"text": "two"}' + end)
    with pytest.raises(DataError, match=r"a\.json: line 2"):
        list(lines(path))


def test_lists_a_line_are_lines_and_an_empty_array_has_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[1]\n{"text": "x"}\n')
    assert [(number, bool(item.problem)) for number, item in lines(path)] == [(1, True), (2, False)]
    path.write_text(" [ ]\n")
    assert list(lines(path)) == []


def prepared(path: Path, folder: Path, **more: Any) -> Any:
    settings = DataSettings(sources=[JSONLSettings(path=str(path), **more)])
    return prepare(settings, folder, tokenizer=chat_tokenizer(RICH), tokenizer_fingerprint="x", seed=0)


def test_a_source_that_loses_more_than_its_share_stops_with_the_reasons_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    good, bad, worse = chat(USER, ANSWER), chat(USER, ANSWER, odd=1), chat({"role": "mage", "content": "x"})
    path.write_text("".join(json.dumps(line) + "\n" for line in [*[good] * 7, bad, worse, bad]))
    with pytest.raises(DataError, match=r"3 of 10 items are quarantined \(30\.0%\); max_lost_share .* 5\.0%") as error:
        prepared(path, tmp_path / "a")
    lines = str(error.value).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2", "x"], ["1", "x"]]
    assert f"{path}:8: unknown key 'odd'" in lines[1]
    assert f"{path}:9: messages.0: unknown role 'mage'" in lines[2]
    kept = prepared(path, tmp_path / "b", max_lost_share=0.3)
    assert (len(kept.stores[0]), kept.stores[0].meta["items"], kept.stores[0].meta["set_aside"]) == (7, 10, 3)
    with pytest.raises(DataError, match="3 of 10 items"):  # and a store that was made when more was allowed
        prepared(path, tmp_path / "b")


class Failing:
    """A tokenizer that fails on one text, as foreign code does."""

    def __init__(self) -> None:
        self._own = chat_tokenizer(CHATML)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, text: str, **more: Any) -> Any:
        if "boom" in text:
            raise ZeroDivisionError("in a\ntokenizer")
        return self._own(text, **more)


@pytest.mark.parametrize("value", [{"text": "boom"}, {"prompt": "boom", "completion": "a"}, chat(USER, ANSWER | {"content": "boom"})])  # fmt: skip
def test_whatever_a_tokenizer_raises_is_one_line(value):
    with pytest.raises(BadItem, match="the tokenizer fails on this text: ZeroDivisionError: in a tokenizer"):
        Encoder(Failing(), 100).records(value, id="x")


def test_shown_text_is_the_records_text():
    coder = chat_encoder(RICH)
    (record,) = coder.records(chat(USER, ANSWER), id="x")
    assert shown(coder, record).replace("[[", "").replace("]]", "") == coder.tokenizer.decode(record.tokens)
    assert ASKS in RICH
