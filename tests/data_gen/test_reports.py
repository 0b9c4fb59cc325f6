"""Records from public reports, read from the shared folder: tokens and labels as computed by hand, labels in [[ ]]."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from drafttrain.core.errors import DataError
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.jsonl import JSONL, JSONLSettings, lines
from drafttrain.data_gen.training_data import prepare
from tests.data_gen.chats import BOS, GENERATION, RICH, chat_encoder, read

TOOL = (
    '{"type": "function", "function": {"name": "weather", "description": "w", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
TOOLS = f"<|im_start|>system\nTools: {TOOL};<|im_end|>\n"
CALL = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'


def turn(role: str, words: str) -> str:
    return f"<|im_start|>{role}\n{words}<|im_end|>\n"


def answer(words: str) -> str:
    return f"<|im_start|>assistant\n[[{words}<|im_end|>]]\n"


def weather(first: str, *, result: str, asked: str = "weather?") -> str:
    return turn("user", asked) + answer(first) + turn("tool", result) + answer("3 degrees")


OK = turn("user", "ok") + answer("fine")
HI = turn("user", "hi") + answer("hello")
TWICE = turn("user", "same") + answer("dup")
UNTRAINED = turn("user", "{0}") + turn("assistant", "BAD") + turn("user", "{1}") + answer("GOOD")
RIGHT = {
    "02-system": [
        turn("system", "You are a pirate.") + turn("user", "q1") + answer("a1"),
        turn("user", "q1") + answer("a1"),
        turn("system", "You are a sailor.") + turn("user", "q2") + answer("a2"),
        turn("system", "You are a cook.") + turn("user", "q3") + answer("a3"),
    ],
    "03-function-call": [TOOLS + weather(CALL, result='{"t":3}', asked="weather in Oslo?"), HI],
    "04-tools": [
        TOOLS + weather(CALL, result="3"),
        TOOLS + weather("Let me look." + CALL, result="3"),
        weather(CALL, result="3"),
        TOOLS + HI,
    ],
    "05-reasoning": [
        turn("user", "2+2?") + answer("<think>two and two</think>4"),
        turn("user", "2+2?") + answer("<think>two and two</think>"),
        turn("user", "2+3?") + answer("<think>hm</think>5"),
    ],
    "06-weights": [UNTRAINED.format("q1", "q2"), UNTRAINED.format("q", "q"), UNTRAINED.format("q1", "q2")],
    "10-parts": [
        turn("user", "hello") + answer("hi there"),
        OK,
        turn("system", "be terse") + OK,
        *[OK] * 4,
        TWICE,
        TWICE,
    ],
    "11-alpaca": [
        turn("user", "add\n1 2") + answer("3"),
        turn("user", "q") + answer("r"),
        "q[[r<|im_end|>]]",
        "prompt: has no completion",
        turn("user", "q") + answer("a"),
        "no known form",
        "q[[c<|im_end|>]]",
    ],
}


@pytest.fixture
def reports(shared_folder: Path) -> Path:
    return shared_folder / "cases" / "reports"


@pytest.mark.parametrize("name", RIGHT)
def test_a_report_is_read_correctly(reports, name):
    coder = chat_encoder(RICH)
    for (_, item), right in zip(lines(reports / name / "data.jsonl"), RIGHT[name], strict=True):
        try:
            found = read(coder, item.value)
        except BadItem as reason:
            found = [str(reason)[: len(right)]]
        assert found == [right]


def test_pre_rendered_text_keeps_one_of_each_special_token(reports):
    coder = chat_encoder(BOS, bos=True)
    asked = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [read(coder, item.value) for _, item in lines(reports / "12-bos" / "data.jsonl")] == [
        [asked + "[[yo<|im_end|>]]\n"],
        ["[[" + asked + "yo<|im_end|>\n]]"],
        [asked + "[[yo<|im_end|>]]"],
        ["<s>hi[[yo<|im_end|>]]"],
    ]
    assert list(coder.notes.values()) == [1]  # the last one: raw text, though there is a template


@pytest.mark.parametrize("name", ["pretty.json", "oneline.json", "perline.json"])
def test_an_array_is_read_whole(reports, name):
    coder = chat_encoder(RICH)
    found = [read(coder, item.value) for _, item in lines(reports / "07-json-array" / name)]
    assert found == [[turn("user", f"question {i}") + answer(f"answer {i}")] for i in range(50)]


def test_a_byte_order_mark_and_windows_line_ends_are_not_part_of_a_text(reports):
    items = list(JSONL(JSONLSettings(path=str(reports / "07-json-array" / "bom_crlf.jsonl"))).items())
    assert [item.value for item in items] == [{"text": f"naïve café {i} 😀👩\u200d🔬 你好\u2028x"} for i in range(4)]


def test_labels_are_what_the_target_writes_whatever_a_template_marks(reports):
    coder = chat_encoder(GENERATION)
    texts = [read(coder, item.value) for _, item in lines(reports / "08-generation-span" / "data.jsonl")]
    # The report's template has line ends after blocks, where Jinja removes them.
    a, b, space, smile = (answer(words)[:-1] for words in ("A", "B", "ends in space   ", "emoji 😀"))
    more = turn("user", "more user words")
    assert texts == [
        [turn("user", "q one two") + a + turn("user", "tail user words")],
        [turn("assistant", "A")[:-1] + turn("user", "user message") + b],
        [turn("user", "q") + space + more + b],
        [turn("user", "q") + smile + more + b],
    ]
    assert not coder.notes


def test_marks_that_reach_into_the_next_turn_are_not_trained_and_reported(reports):
    folder = reports / "08-generation-span"
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok-wordlevel")
    coder = Encoder(tokenizer, 256)
    ((_, item),) = lines(folder / "w.jsonl")
    (record,) = coder.records(item.value, id="x")
    labels = [token for token, flag in zip(record.tokens, record.loss_mask, strict=True) if flag]
    assert tokenizer.convert_ids_to_tokens(labels) == ["good", "<e>", "bad", "<e>"]
    assert [("{% generation %}" in note, count) for note, count in coder.notes.items()] == [(True, 1)]


def test_a_template_that_fails_is_one_line_with_file_and_line(reports, tmp_path):
    folder = reports / "35-template"
    path = folder / "data.jsonl"
    settings = DataSettings(sources=[JSONLSettings(path=str(path))])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    with pytest.raises(
        DataError,
        match=rf"nothing is left of 1 items\n  1 x {path}:1: the chat template fails on this chat: TypeError[^\n]*$",
    ):
        prepare(settings, tmp_path / "d", tokenizer=tokenizer, tokenizer_fingerprint="x", seed=0)
