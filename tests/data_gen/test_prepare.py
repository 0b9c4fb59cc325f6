"""From the data section to records: what is read of every source, what counts as overlap, what is encoded anew."""

import json
from pathlib import Path
from typing import Any

from drafttrain.config.load import read_recipe
from drafttrain.config.smoke import shrink
from drafttrain.data_gen.formats import Encoder
from drafttrain.data_gen.prepare import TrainingData, generate_texts, prepare
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.jsonl import JSONLSettings
from tests.conftest import byte_tokenizer

TEMPLATE = (
    "<system>You are a helpful assistant.|{% for m in messages %}<{{ m['role'] }} says>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant says>{% endif %}"
)


def write_lines(path: Path, values: list[dict[str, Any]]) -> JSONLSettings:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return JSONLSettings(path=str(path))


def prepared(folder: Path, sources: list[Any], *, template: str | None = None, **settings: Any) -> TrainingData:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    chosen = DataSettings(sources=sources, **settings)
    return prepare(chosen, folder / "d", tokenizer=tokenizer, tokenizer_fingerprint="x", seed=0)


def smoked(data: str) -> DataSettings:
    text = f"name: x\ndrafter: {{kind: causal_lm}}\nloss: {{kind: ce}}\ndata: {data}\n"
    return shrink(read_recipe(text, source="x")).data


def test_what_a_template_puts_around_every_chat_is_no_overlap(tmp_path):
    source = write_lines(
        tmp_path / "a.jsonl", [{"text": "<system>You are a helpful assistant.|<user says>Tell me about the sea."}]
    )
    data = prepared(tmp_path, [source], template=TEMPLATE)
    asked = {"same": "Please: tell me about the sea. Now!", "other": "Name a sea.", "short": "Tell me"}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    encoder = Encoder(tokenizer, 256)
    prompts = {id: encoder.prompts({"prompt": text}, id=id, prompt_tokens=None)[0][1] for id, text in asked.items()}
    assert data.contaminated(prompts) == ["same"]
    framed = write_lines(tmp_path / "b.jsonl", [{"text": "sea.|<assistant says>I know"}])
    assert prepared(tmp_path, [framed], template=TEMPLATE).contaminated(prompts) == []
    plain = {"text": encoder.text("You are a helpful assistant.")}
    assert data.contaminated(plain) == ["text"]


def test_smoke_reads_some_items_of_a_source_and_whole_ones(tmp_path):
    chat = [{"role": "user", "content": "q" * 150}, {"role": "assistant", "content": "a" * 20}]
    source = write_lines(tmp_path / "a.jsonl", [{"messages": chat}] * 200)
    small = smoked(f"{{sources: [{{kind: jsonl, path: {source.path}}}], max_length: 256}}")
    data = prepared(tmp_path, small.sources, template=TEMPLATE, max_length=small.max_length)
    assert len(data.stores[0]) == 64
    assert {len(record.tokens) for record in data.stores[0]} == {len(data.stores[0][0].tokens)}
    assert len(data.stores[0][0].tokens) > 170


def test_smoke_starts_generation_from_long_prompts_too(tmp_path, tiny_target):
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "x" * 120, "chat": False}] * 200)
    generated = f"{{prompts: {{kind: jsonl, path: {prompts.path}}}, num_records: 2, max_new_tokens: 2}}"
    small = smoked(f"{{sources: [{{kind: generated}}], generate: {generated}, max_length: 256}}")
    generate_texts(small, lambda: tiny_target, tmp_path / "d", seed=0)
    assert (tmp_path / "d" / "generated" / "manifest.json").exists()
