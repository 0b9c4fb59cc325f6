"""Names select random streams: they depend on content and order only, and no two records share one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drafttrain.data_gen.annotate import Frozen
from drafttrain.data_gen.annotate.acceptance import AcceptanceLabelSettings
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.names import Names, problem_of
from drafttrain.data_gen.serving_logs.settings import ServingLogsSettings
from drafttrain.data_gen.settings import DataSettings, GenerateSettings
from drafttrain.data_gen.sources.jsonl import JSONLSettings
from drafttrain.data_gen.sources.parquet import ParquetSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.stored.labelled_tokens import annotate
from drafttrain.data_gen.training_data import TrainingData, prepare
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from tests.conftest import byte_tokenizer, random_llama


def write_lines(path: Path, values: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def written(prompts: Any, target: Any, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Return the target's texts after prompts, at temperature 1."""
    chosen = {
        "num_records": 4,
        "temperatures": [1.0],
        "top_p": 1.0,
        "max_new_tokens": 12,
        "batch_size": 4,
        "prompt_tokens": None,
    } | settings
    generate(GenerateSettings(prompts=prompts, **chosen), target, folder, seed=0, max_length=64)
    shards = sorted(folder.glob("shard-*"))
    return [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]


def prepared(folder: Path, *sources: Any) -> TrainingData:
    settings = DataSettings(sources=list(sources), max_length=16)
    return prepare(settings, folder, tokenizer=byte_tokenizer(), tokenizer_fingerprint="x", seed=0)


def new(record: dict[str, Any]) -> list[int]:
    return [token for token, label in zip(record["tokens"], record["loss_mask"], strict=True) if label]


def test_a_repeated_name_gets_a_number():
    names = Names()
    assert [names.own(name) for name in ("a", "b", "a", "a#1", "a", "a#2", "")] == [
        "a",
        "b",
        "a#1",
        "a#1#1",
        "a#2",
        "a#2#1",
        "",
    ]
    assert names.num_shared == 4
    assert [problem_of(name) for name in ("a", "a#12", "a#1#1", "c#", "f#minor")] == ["a", "a", "a#1", "c#", "f#minor"]


def test_prompts_that_share_an_id_have_their_own_random_numbers(tiny_target, tmp_path, capfd):
    shared = [{"id": "x", "prompt": "tell me"}] * 3 + [{"id": "y", "prompt": "tell me"}]
    records = written(JSONLSettings(path=write_lines(tmp_path / "p.jsonl", shared)), tiny_target, tmp_path / "g")
    assert len({tuple(new(record)) for record in records}) == 4
    assert sorted(record["id"] for record in records) == ["x", "x#1", "x#2", "y"]
    assert "records that repeat the id of an earlier one, or its content without an id: 2; each" in " ".join(
        capfd.readouterr().err.split()
    )
    assert json.loads((tmp_path / "g" / "manifest.json").read_text())["shared_names"] == 2
    # A prompt with a unique id has the same draws as ever.
    alone = [{"id": "x", "prompt": "tell me"}]
    (only,) = written(
        JSONLSettings(path=write_lines(tmp_path / "q.jsonl", alone)), tiny_target, tmp_path / "h", num_records=1
    )
    assert only in records


def test_a_prompt_that_is_used_again_never_draws_what_another_one_draws(tiny_target, tmp_path):
    """x#1 is the second use of x, and the id of another prompt."""
    shared = [{"id": "x", "prompt": "tell me"}, {"id": "x#1", "prompt": "tell me"}]
    records = written(JSONLSettings(path=write_lines(tmp_path / "p.jsonl", shared)), tiny_target, tmp_path / "g")
    assert len({record["id"] for record in records}) == 4
    assert len({tuple(new(record)) for record in records}) == 4


LINES = [{"text": text} for text in ("tell me", "and you", "a longer text, in pieces", "tell me")]


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_a_file_in_another_folder_gives_the_same_texts(tiny_target, tmp_path, kind):
    def source(folder: Path) -> Any:
        folder.mkdir(parents=True)
        if kind == "jsonl":
            return JSONLSettings(path=write_lines(folder / f"{folder.name}.jsonl", LINES))
        if kind == "text":
            for number, line in enumerate(LINES):
                (folder / f"{number}.txt").write_text(line["text"])
            return TextSettings(path=str(folder))
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LINES), folder / f"{folder.name}.parquet")
        return ParquetSettings(path=str(folder / f"{folder.name}.parquet"))

    here, there = source(tmp_path / "here"), source(tmp_path / "else" / "where")
    texts = [written(one, tiny_target, tmp_path / f"g{i}", num_records=6) for i, one in enumerate((here, there))]
    assert texts[0] == texts[1]
    assert len({tuple(new(record)) for record in texts[0]}) == 6
    ids = [prepared(tmp_path / f"d{i}", one).stores[0].ids for i, one in enumerate((here, there))]
    assert ids[0] == ids[1]


def test_an_answer_in_a_log_that_was_rotated_keeps_its_name(tmp_path):
    said = [{"prompt": "a", "completion": "one"}, {"prompt": "b", "completion": "two"}]
    first, second = (
        prepared(tmp_path / f"d{i}", ServingLogsSettings(path=write_lines(tmp_path / name, said))).stores[0].ids
        for i, name in enumerate(("served.log", "old/served.log.1"))
    )
    assert first == second
    assert len(set(first)) == 2


@pytest.mark.parametrize("strange", ["a\rb", "a\nb", "a\r\nb", "a\x0bb", "a\x85b", "a\u2028b", "", "a\x1fb"])
def test_a_strange_id_shifts_no_other(tmp_path, strange):
    ids = ["first", strange, "last", strange]
    lines = [{"id": id, "tokens": [1 + number, 2, 3]} for number, id in enumerate(ids)]
    store = prepared(tmp_path / "d", JSONLSettings(path=write_lines(tmp_path / "a.jsonl", lines))).stores[0]
    assert [(record.id, record.tokens[0]) for record in store] == list(
        zip([*ids[:3], f"{strange}#1"], [1, 2, 3, 4], strict=True)
    )
    assert store.meta["shared_names"] == 1


def test_labels_of_records_that_share_an_id_have_their_own_random_numbers(tiny_target, tmp_path):
    """Within a source and across two, where both count from 0."""
    line = {"id": "0", "tokens": list(range(1, 16))}
    sources = [JSONLSettings(path=write_lines(tmp_path / f"{name}.jsonl", [line] * 20)) for name in "ab"]
    data = prepared(tmp_path / "d", *sources)
    drafter = CausalLMDrafter(random_llama(seed=0, num_layers=1)).eval().requires_grad_(False)
    found = annotate(
        AcceptanceLabelSettings(mixing=0.0, held_out=0.5), data, Frozen(tiny_target, drafter, 0), tmp_path / "labelled"
    )
    rows = torch.cat([found.train.labels_N, found.held_out.labels_N]).view(40, -1)
    assert len({tuple(row.tolist()) for row in rows}) == 40
    assert 0 < len(found.held_out) < 40 * 14, "each is held out, or not, for itself"
