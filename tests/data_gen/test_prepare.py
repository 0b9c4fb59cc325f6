"""From the data section to records: what is read of every source, what counts as contamination, what is encoded again."""

import json
from pathlib import Path
from typing import Any

import pytest

from drafttrain.config.load import read_recipe
from drafttrain.config.smoke import shrink
from drafttrain.core.errors import DataError
from drafttrain.core.files import sha256_of
from drafttrain.data_gen.encoder import Encoder
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.generated import Generated, GeneratedSettings
from drafttrain.data_gen.sources.jsonl import JSONL, JSONLSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.training_data import TrainingData, generate_texts, prepare
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


def test_tokens_of_the_template_are_not_contamination(tmp_path):
    source = write_lines(
        tmp_path / "a.jsonl", [{"text": "<system>You are a helpful assistant.|<user says>Tell me about the sea."}]
    )
    data = prepared(tmp_path, [source], template=TEMPLATE)
    asked = {"same": "Please: tell me about the sea. Now!", "other": "Name a sea.", "short": "Tell me"}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    encoder = Encoder(tokenizer, 256)
    prompts = {id: [encoder.prompts({"question": text}, id=id, prompt_tokens=None)[0][1]] for id, text in asked.items()}
    assert data.contaminated(prompts) == ["same"]
    framed = write_lines(tmp_path / "b.jsonl", [{"text": "sea.|<assistant says>I know"}])
    assert prepared(tmp_path, [framed], template=TEMPLATE).contaminated(prompts) == []
    plain = {"text": [encoder.text("You are a helpful assistant.")]}
    assert data.contaminated(plain) == ["text"]


def test_smoke_reads_a_few_whole_items_of_a_source(tmp_path):
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


def test_an_edited_file_is_encoded_again_and_an_unchanged_one_is_not(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    prepared(tmp_path, [source])
    kept = (tmp_path / "d" / "0-jsonl" / "tokens.npy").stat().st_ino
    assert len(prepared(tmp_path, [source]).stores[0]) == 1
    assert (tmp_path / "d" / "0-jsonl" / "tokens.npy").stat().st_ino == kept
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert len(prepared(tmp_path, [source]).stores[0]) == 2
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text("one")
    text = TextSettings(path=str(tmp_path / "t"))
    assert prepared(tmp_path, [text]).stores[0].meta["tokens"] == 4
    (tmp_path / "t" / "a.txt").write_text("three")
    assert prepared(tmp_path, [text]).stores[0].meta["tokens"] == 6


def shards(folder: Path) -> GeneratedSettings:
    folder.mkdir(parents=True)
    write_lines(folder / "shard-00000.jsonl", [{"text": str(number)} for number in range(8)])
    entry = {"file": "shard-00000.jsonl", "records": 8, "sha256": sha256_of(folder / "shard-00000.jsonl")}
    (folder / "manifest.json").write_text(json.dumps({"shards": [entry]}))
    return GeneratedSettings(path=str(folder))


def test_a_shard_that_differs_from_its_manifest_is_refused(tmp_path):
    source = shards(tmp_path / "generated")
    assert [item.value["text"] for item in Generated(source).items()] == [str(number) for number in range(8)]
    write_lines(tmp_path / "generated" / "shard-00000.jsonl", [{"text": str(number)} for number in range(4)])
    with pytest.raises(DataError, match=r"shard-00000\.jsonl: differs from manifest\.json"):
        list(Generated(source).items())


def test_brackets_in_the_name_of_a_folder_are_not_a_pattern(tmp_path):
    assert len(list(Generated(shards(tmp_path / "r[1]")).items())) == 8
    source = write_lines(tmp_path / "r[1]" / "a.jsonl", [{"text": "one"}])
    assert len(list(JSONL(source).items())) == 1
