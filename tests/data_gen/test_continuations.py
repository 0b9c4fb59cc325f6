"""Answers are encoded as continuations: a tokenizer that puts a space before every text adds none in the middle of one."""

import gzip
import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from drafttrain.core.errors import DataError
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.plain_ids import continuation_ids, plain_ids
from drafttrain.data_gen.serving_logs.encoding import ExchangeEncoder
from drafttrain.data_gen.serving_logs.exchange import Exchange
from drafttrain.data_gen.sources.jsonl import lines
from tests.data_gen.chats import ASKS, CHATML, RICH, chat_encoder, read

WORDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: a space before every text, and tokens that span the start of an answer."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz:.\n"]
    merges = [("▁", "o"), ("▁", "▁"), ("▁o", "n")]
    vocab = {token: id for id, token in enumerate(["<unk>", "</s>", *letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    found.chat_template = WORDS
    return found


@pytest.mark.parametrize(
    ("prompt", "completion"), [("a:", " on"), ("a: ", "on"), ("a o", "n"), ("a\n", "  b"), ("a", "\nb")]
)
def test_prompt_and_completion_are_read_as_one_text(prompt, completion):
    tokenizer = spaced_tokenizer()
    (record,) = Encoder(tokenizer, 100).records({"prompt": prompt, "completion": completion}, id="x")
    labels = [token for token, flag in zip(record.tokens, record.loss_mask, strict=True) if flag]
    # Each token has its letters; the first one of the text also has the space of the tokenizer.
    spelled = "".join(tokenizer.convert_ids_to_tokens(list(record.tokens)))
    assert spelled == "▁" + (prompt + completion).replace(" ", "▁") + "</s>"
    assert "".join(tokenizer.convert_ids_to_tokens(labels)) == completion.replace(" ", "▁") + "</s>"


@pytest.mark.parametrize("answer", ["on", "b", " on", "\nb"])
def test_an_answer_after_a_space_has_its_own_tokens(answer):
    tokenizer = spaced_tokenizer()
    (record,) = Encoder(tokenizer, 100).records({"question": "q", "answer": answer}, id="x")
    labels = [token for token, flag in zip(record.tokens, record.loss_mask, strict=True) if flag]
    assert "".join(tokenizer.convert_ids_to_tokens(labels)) == answer.replace(" ", "▁") + "</s>"


@pytest.mark.parametrize("answer", ["on", "b", "\nb"])
def test_a_logged_answer_to_a_chat_is_a_continuation_too(answer):
    tokenizer = spaced_tokenizer()
    encoder = ExchangeEncoder(Encoder(tokenizer, 100), lambda text: text, logprobs=False)
    record = encoder.record(Exchange("x", [{"role": "user", "content": "q"}], answer))
    labels = [token for token, flag in zip(record.tokens, record.loss_mask, strict=True) if flag]
    assert "".join(tokenizer.convert_ids_to_tokens(labels)) == answer.replace(" ", "▁")


def test_a_tokenizer_that_adds_nothing_encodes_continuations_as_texts():
    tokenizer = chat_encoder(None).tokenizer
    for text in ("a", " a", "\n a", "\n"):
        assert continuation_ids(tokenizer, text) == plain_ids(tokenizer, text)


TEXT_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    + ASKS
)


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("template", [TEXT_CALLS, RICH])
def test_arguments_of_calls_have_the_form_that_the_template_reads(template, arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    chat = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    }
    (text,) = read(chat_encoder(template), chat)
    assert text.endswith(
        ('[[<call>f {"x": 1}</call><|im_end|>]]\n', '[[<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>]]\n')
    )


def test_thoughts_in_an_answer_that_the_template_drops_are_refused():
    drops = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]
    with pytest.raises(BadItem, match=r"leaves out a part of 'content' of an answer .turn 1., from 'hm'"):
        read(chat_encoder(drops), {"messages": turns})
    assert read(chat_encoder(CHATML), {"messages": turns})[0].endswith("[[<think>\nhm\n</think>\n\na<|im_end|>]]\n")


PLAIN = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n"
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "value",
    [
        {"messages": TURNS, "conversations": [], "text": ""},
        {"messages": TURNS, "parallel_tool_calls": False, "temperature": 0.7},
        {"question": "q", "response": "a", "id": "flan.1"},
        {"instruction": "q", "response": "a", "category": "qa"},
        {"query": "q", "answer": "a"},
    ],
)
def test_records_of_well_known_data_sets_are_read(value):
    assert read(chat_encoder(RICH), value) == [PLAIN]


@pytest.mark.parametrize(
    "value", [{"text": ["a", "b"]}, {"instruction": "q", "output": ["a", "b"]}, {"question": ["q"], "answer": "a"}]
)
def test_a_list_in_place_of_text_is_not_read_as_parts(value):
    with pytest.raises(BadItem, match="must be text, got list"):
        read(chat_encoder(RICH), value)


def test_calls_that_a_table_holds_as_json_text_are_read():
    calls = json.dumps([{"name": "f", "arguments": {"x": 1}}])
    chat = {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}]}
    assert read(chat_encoder(RICH), chat)[0].endswith(
        '[[<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>]]\n'
    )


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": "b"}\n', '[{"text": "a"},\n{"text": "b"}]'])
def test_gzip_files_are_unpacked(tmp_path, text):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert [(number, item.value) for number, item in lines(path)] == [(1, {"text": "a"}), (2, {"text": "b"})]
    path.write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(DataError, match=r"d\.jsonl\.gz: a damaged gzip file"):
        list(lines(path))
