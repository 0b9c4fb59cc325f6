"""Formats, masks, quarantine: what becomes a label, and what is quarantined with its reason."""

import json
from pathlib import Path

import pytest

from drafttrain.core.errors import DataError
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.sources import sources
from drafttrain.data_gen.sources.hub import HubSettings
from drafttrain.data_gen.sources.jsonl import JSONL, JSONLSettings
from drafttrain.data_gen.sources.parquet import Parquet, ParquetSettings
from drafttrain.data_gen.sources.text import Text, TextSettings
from drafttrain.data_gen.stored.records import open_store
from tests.conftest import byte_tokenizer

MARKED = "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}|{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
REFUSES = "{% if messages and messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
FORGETS = "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}(thought){% endif %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
"""Like Qwen3's: drops the thoughts of earlier answers."""
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "bye"},
]


def encoder(template: str | None = None, max_length: int = 200) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, max_length)


def labels(coder: Encoder, value: dict) -> str:  # type: ignore[type-arg]
    (record,) = coder.records(value, id="x")
    chosen = [token for token, flag in zip(record.tokens, record.loss_mask, strict=True) if flag]
    return coder.tokenizer.decode(chosen)


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_only_answers_of_the_assistant_are_labels(template):
    assert labels(encoder(template), {"messages": CHAT}) == "hello|bye|"
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    assert labels(encoder(template), {"conversations": shared}) == "hello|bye|"


def test_where_a_template_rewrites_earlier_turns_each_answer_is_trained_in_the_context_that_the_target_reads():
    coder = encoder(FORGETS)
    found = coder.records({"messages": CHAT}, id="x")
    read = [
        (coder.tokenizer.decode(r.tokens), "".join("^" if flag else " " for flag in r.loss_mask).strip()) for r in found
    ]
    assert read == [
        ("<user>hi|<assistant>(thought)hello|", "^" * len("(thought)hello|")),
        ("<user>hi|<assistant>hello|<user>ok|<assistant>(thought)bye|", "^" * len("(thought)bye|")),
    ]
    assert [r.id for r in found] == ["x@0", "x@1"]
    (prompt,) = coder.prompts({"messages": CHAT}, id="x", prompt_tokens=None)
    assert found[1].tokens[: len(prompt[1])] == prompt[1]


def test_turns_after_the_last_answer_are_read_and_not_labels():
    (record,) = encoder(PLAIN).records({"messages": CHAT[:3]}, id="x")
    assert encoder().tokenizer.decode(record.tokens) == "<user>hi|<assistant>hello|<user>ok|"
    assert labels(encoder(PLAIN), {"messages": CHAT[:3]}) == "hello|"
    assert labels(encoder(PLAIN), {"messages": CHAT[1:]}) == "bye|"  # and an answer that opens a chat answers nothing
    with pytest.raises(BadItem, match="renders an answer differently from its generation prompt"):
        encoder(PLAIN.replace("{% if add_", "{% if messages|length < 3 %}?{% endif %}{% if add_")).records(
            {"messages": CHAT[:2]}, id="x"
        )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"tokens": [99999]}, "99999 is not an id"),
        ({"tokens": []}, "0 tokens, fewer than the 10 of a prompt"),
        ({"text": "too short"}, "9 tokens, fewer than the 10 of a prompt"),
        ({"prompt": "x" * 300}, r"a prompt must have 1\.\.199 tokens: this one has 300"),
        ({"prompt": 5}, "must be text"),
        ({"prompt": ["x"]}, r"prompt\.0: must be a mapping"),
        ({"completion": "x"}, "no known form: has none of"),
    ],
)
def test_a_bad_prompt_is_refused_with_its_reason(value, reason):
    with pytest.raises(BadItem, match=reason):
        encoder().prompts(value, id="x", prompt_tokens=10)


def test_only_the_completion_is_a_label_and_text_is_one_whole():
    assert labels(encoder(), {"prompt": "a b", "completion": "c d"}) == "c d<|end|>"
    assert labels(encoder(), {"text": "a b"}) == "a b<|end|>"
    assert labels(encoder(), {"tokens": [66, 67, 68], "loss_mask": [0, 1, 1]}) == encoder().tokenizer.decode([67, 68])


def test_long_text_is_cut_without_losing_a_token():
    text = "abcdefghij" * 5
    found = encoder(max_length=16).records({"text": text}, id="doc")
    assert encoder().tokenizer.decode([t for r in found for t in r.tokens]) == text + "<|end|>"
    assert [r.id for r in found] == ["doc@0", "doc@16", "doc@32", "doc@48"]


@pytest.mark.parametrize("length", range(1, 34))
@pytest.mark.parametrize("max_length", [2, 3, 16])
def test_every_text_ends_with_a_label_that_ends_it(length, max_length):
    """Also a text whose length is a multiple of a record's: its end is read after it, like any other label."""
    coder = encoder(max_length=max_length)
    text = ("abcdefghij" * 4)[:length]
    records = coder.records({"text": text}, id="x")
    assert all(1 < len(record.tokens) <= max_length and all(record.loss_mask) for record in records)
    assert coder.tokenizer.decode([records[-1].tokens[-1]]) == "<|end|>"
    whole = coder.tokenizer(text + "<|end|>").input_ids
    learned = set()
    for record in records:
        start = int(record.id.removeprefix("x@"))
        assert list(record.tokens) == whole[start : start + len(record.tokens)]
        learned |= set(range(start + 1, start + len(record.tokens)))
    # The first token of a record has nothing before it; where the end takes a place, one more record begins.
    assert len(learned) == length + 1 - len(records) - (length % max_length == 0)
    assert length in learned


def test_a_text_of_one_token_is_quarantined():
    coder = encoder()
    coder.tokenizer.eos_token = None
    with pytest.raises(BadItem, match="one token"):
        coder.records({"text": "a"}, id="x")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "no known form: has none of messages"),
        ({"messages": []}, "a list of turns"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": CHAT[:1]}, "no token of the first"),
        ({"prompt": "x" * 500, "completion": "y"}, "no token of the first"),
        ({"text": ""}, "must be text"),
        ({"text": 5}, "must be text"),
        ({"tokens": [1, 999]}, "999 is not an id"),
        ({"text": "half \ud800"}, "half a surrogate pair at character 5"),
        ({"text": "whole", "id": "\ud800"}, "id: .*half a surrogate pair"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"unknown role \['user'\]"),
        ({"messages": [{"role": "system", "content": "x"}, *CHAT]}, "template refuses this chat: no system here"),
        ({"tokens": [1, 2], "loss_mask": [1]}, "loss_mask"),
    ],
)
def test_a_bad_item_is_refused_with_its_reason(value, reason):
    with pytest.raises(BadItem, match=reason):
        encoder(REFUSES + MARKED).records(value, id="x")


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(BadItem, match="no chat template"):
        encoder().records({"messages": CHAT}, id="x")


def test_bad_lines_never_stop_a_run_and_are_quarantined_with_their_reasons(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good one"}\nnot json\n[1]\n{"txet": 1}\n\n{"text": "good two"}\n')
    store = open_store(
        tmp_path / "s", JSONL(JSONLSettings(path=str(path))), encoder(), about={"source": {"kind": "jsonl"}}
    )
    assert len(store) == 2
    assert store.meta["set_aside"] == 3
    kept = [json.loads(line) for line in (tmp_path / "s" / "quarantine.jsonl").read_text().splitlines()]
    assert [one["where"].rsplit(":", 1)[1] for one in kept] == ["2", "3", "4"]
    assert kept[0]["item"] == "not json"
    assert [store[0], store[1]] == encoder().records({"text": "good one"}, id=store[0].id[:-2]) + encoder().records(
        {"text": "good two"}, id=store[1].id[:-2]
    )


@pytest.mark.parametrize("depth", [100, 950, 980, 100_000])
def test_deeply_nested_json_stops_no_run(tmp_path, depth):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n{"messages": ' + "[" * depth + "]" * depth + "}\n")
    store = open_store(
        tmp_path / "s", JSONL(JSONLSettings(path=str(path))), encoder(), about={"source": {"kind": "jsonl"}}
    )
    assert (len(store), store.meta["set_aside"]) == (1, 1)


def test_nothing_left_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("broken\n")
    with pytest.raises(DataError, match="nothing is left of 1 items"):
        open_store(tmp_path / "s", JSONL(JSONLSettings(path=str(path))), encoder(), about={"source": {"kind": "jsonl"}})


def test_the_same_text_comes_out_of_every_kind_of_source(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["first text", "second text"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    found = [
        Parquet(ParquetSettings(path=str(tmp_path / "a.parquet"))),
        JSONL(JSONLSettings(path=str(tmp_path / "*.jsonl"))),
        Text(TextSettings(path=str(folder))),
    ]
    for source in found:
        assert [item.value["text"] for item in source.items()] == texts


def test_a_local_folder_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"content": "one"}\n{"content": "two"}\n')
    settings = HubSettings(path=str(folder), rename={"text": "content"})
    coder = encoder().reading_as(settings)
    assert [labels(coder, item.value) for item in sources.build(settings).items()] == ["one<|end|>", "two<|end|>"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        list(JSONL(JSONLSettings(path=str(Path(tmp_path) / "nothing.jsonl"))).items())
