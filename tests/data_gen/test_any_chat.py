"""Any item gives records or is quarantined with its reason: no crash, and every item is counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.quarantine import read_items
from drafttrain.data_gen.record_keys import FORMS, KEYS
from drafttrain.data_gen.sources import Item
from drafttrain.data_gen.sources.jsonl import JSONL, JSONLSettings
from drafttrain.data_gen.turns import FLAGS, PASSED, ROLES
from tests.data_gen.chats import GENERATION, RICH, chat_encoder

WORDS = st.one_of(
    st.sampled_from(["", " ", "a", "q\n", "<|im_end|>", "<s>", "{{ x }}", "{% raw %}", "\ud800", "naïve 😀", "[]", "{", '{"name": "f"}']),
    st.text(max_size=8),
)  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Valid values, and in a few cases invalid ones."""
    return st.integers(0, 30).flatmap(lambda n: ODD if n == 17 else strategy)


GOOD = st.integers(0, 9).flatmap(lambda n: WORDS if n == 7 else st.sampled_from(["a", "b c", "hm", "q\n"]))


CALL = st.fixed_dictionaries({"name": mostly(GOOD), "arguments": mostly(st.just('{"x": 1}') | st.just({"x": 1}))})
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "text", "input_text", "image_url"]), "text": GOOD}),
    max_size=2,
)
TURN = st.tuples(
    st.sampled_from(["role", "from"]),
    mostly(st.sampled_from([*ROLES, "Assistant", "wizard"])),
    st.sampled_from(["content", "value"]),
    mostly(GOOD | PARTS),
    st.dictionaries(
        st.sampled_from([*PASSED, *FLAGS, "tool_calls", "function_call", "odd", "id"]), mostly(GOOD), max_size=1
    ),
    st.dictionaries(st.sampled_from(FLAGS), mostly(st.sampled_from([0, 1, True, False, 0.5])), max_size=1),
    st.dictionaries(
        st.just("tool_calls"), mostly(st.lists(CALL | CALL.map(lambda one: {"function": one}), max_size=2)), max_size=1
    ),
).map(lambda t: {t[0]: t[1], t[2]: t[3]} | (t[4] if t[4] and len(str(t[4])) % 3 == 0 else {}) | t[5] | t[6])
QUESTION = st.fixed_dictionaries({"role": st.just("user"), "content": mostly(GOOD)})
REPLY = st.fixed_dictionaries({"role": st.just("assistant"), "content": mostly(GOOD)})
TURNS = st.one_of(
    st.lists(st.tuples(QUESTION, REPLY), min_size=1, max_size=3).map(
        lambda pairs: [turn for pair in pairs for turn in pair]
    ),
    st.lists(mostly(TURN), max_size=4),
)
IDS = st.lists(st.integers(-2, 300), max_size=6)
VALUES = {
    "messages": TURNS, "conversations": TURNS, "turns": st.lists(GOOD, max_size=2) | TURNS, "prompt": GOOD | TURNS,
    "completion": GOOD | TURNS, "tokens": IDS, "input_ids": IDS, "labels": IDS, "loss_mask": st.lists(st.sampled_from([0, 1, 0.5]), max_size=6),
    "tools": st.lists(CALL, max_size=2), "history": st.lists(st.lists(GOOD, min_size=2, max_size=2), max_size=2),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "tools", "messages", "bos_token"]), ODD, max_size=2),
}  # fmt: skip


def keyed(key: str) -> st.SearchStrategy[dict[str, Any]]:
    return mostly(VALUES.get(key, GOOD)).map(lambda value: {key: value})


ANSWERS = {"instruction": "output", "question": "answer", "query": "response", "prompt": "completion"}


def record_of(form: str) -> st.SearchStrategy[dict[str, Any]]:
    """A record of a form, some of its other keys, and sometimes a key of another form."""
    more = st.lists(st.sampled_from(FORMS[form]).flatmap(keyed), max_size=2) if FORMS[form] else st.just([])
    other = st.lists(st.sampled_from([*KEYS, "odd", "source", "_x"]).flatmap(keyed), max_size=1)
    rare = st.integers(0, 3).flatmap(lambda n: other if n == 3 else st.just([]))
    answer = keyed(ANSWERS[form]) if form in ANSWERS else st.just({})
    parts = st.tuples(rare, more, answer, keyed(form))
    return parts.map(lambda t: {k: v for part in [*t[0], *t[1], t[2], t[3]] for k, v in part.items()})


RECORD = st.integers(0, 9).flatmap(
    lambda n: (
        st.dictionaries(st.sampled_from(KEYS), ODD, max_size=3)
        if n == 7
        else st.sampled_from([*FORMS]).flatmap(record_of)
    )
)
CODERS = [
    chat_encoder(template, bos=bos, max_length=120)
    for template, bos in ((RICH, False), (GENERATION, True), (None, True))
]


def outcome(read: Callable[[], list[Any]]) -> tuple[list[Any], str]:
    """Return the records of an item, or the reason why there are none."""
    try:
        return read(), ""
    except BadItem as reason:
        return [], str(reason)


def check(value: Any) -> None:
    for coder in CODERS:
        records, reason = outcome(lambda coder=coder: coder.records(value, id="x"))
        assert bool(records) != bool(reason)
        for record in records:
            assert len(record.tokens) == len(record.loss_mask) <= 120
            assert any(record.loss_mask[1:])
            assert all(0 <= token < coder.size for token in record.tokens)
        prompts, against = outcome(lambda coder=coder: coder.prompts(value, id="x", prompt_tokens=2))
        assert bool(prompts) != bool(against)
        assert all(0 < len(tokens) < 120 for _, tokens in prompts)
        assert "\n" not in reason + against
        event(f"{'record' if records else 'quarantined'}, {'prompt' if prompts else 'quarantined'}")


@settings(max_examples=150)
@given(RECORD)
def test_any_record_gives_records_or_a_reason(value):
    check(value)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(RECORD)
def test_any_of_many_records_gives_records_or_a_reason(value):
    check(value)


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=30) | RECORD.map(lambda value: json.dumps(value).encode()), min_size=1, max_size=8))
def test_every_line_of_a_file_is_read_or_in_quarantine(tmp_path_factory, lines):
    folder: Path = tmp_path_factory.mktemp("any")
    path = folder / "a.jsonl"
    good = b'{"text": "good"}'
    # A good line in front: a file that begins with [ is an array, read as a whole or refused.
    path.write_bytes(b"\n".join([good, *lines]) + b"\n")
    num_items = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    read: list[str] = []

    def one(item: Item) -> list[Any]:
        records = CODERS[0].records(item.value, id=item.where)
        read.append(item.where)
        return records

    assert list(read_items(JSONL(JSONLSettings(path=str(path))), one, folder / "q.jsonl", name="any"))
    quarantined = [json.loads(line)["where"] for line in (folder / "q.jsonl").read_text().splitlines()]
    assert len({*read, *quarantined}) == len(read) + len(quarantined) == num_items
