"""Generated texts: byte-identical however often the run was killed; the cache: bit for bit, and the live target's distribution."""

import json

import numpy as np
import pytest
import torch

from drafttrain.core.errors import DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task, builtin
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.data_gen.generate import generate
from drafttrain.data_gen.settings import DataSettings, GenerateSettings
from drafttrain.data_gen.sources.generated import GeneratedSettings
from drafttrain.data_gen.sources.jsonl import JSONLSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.stored.target_cache import RowCache
from drafttrain.data_gen.training_data import attach_cache, generate_texts, prepare


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, again and again. " * 8)
    return GenerateSettings(
        prompts=TextSettings(path=str(tmp_path / "text.txt")),
        prompt_tokens=10,
        num_records=20,
        max_new_tokens=8,
        batch_size=4,
        records_per_shard=8,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize("killed_at", [0, 1, 4])
def test_a_killed_run_ends_with_the_same_bytes(settings, tiny_target, tmp_path, monkeypatch, killed_at):
    whole = contents(generate(settings, tiny_target, tmp_path / "whole", seed=0, max_length=64))
    assert len(whole) == 3
    calls = 0

    def dies(*a, **k):
        nonlocal calls
        calls += 1
        if calls > killed_at:
            raise KeyboardInterrupt
        return continuations(*a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "continuations", dies)
        with pytest.raises(KeyboardInterrupt):
            generate(settings, tiny_target, tmp_path / "killed", seed=0, max_length=64)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert contents(generate(settings, tiny_target, tmp_path / "killed", seed=0, max_length=64)) == whole


def test_every_record_states_its_sampling(settings, tiny_target, tmp_path):
    folder = generate(settings, tiny_target, tmp_path / "g", seed=0, max_length=64)
    records = [json.loads(line) for _, text in contents(folder).items() for line in text.decode().splitlines()]
    assert [r["sampling"]["temperature"] for r in records[:4]] == [0.0, 0.3, 0.7, 1.0]
    assert {r["sampling"]["top_p"] for r in records} == {1.0, 0.95}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target_fingerprint"] == tiny_target.fingerprint
    assert manifest["seed"] == 0
    assert sum(shard["records"] for shard in manifest["shards"]) == 20


def test_texts_are_found_by_what_they_depend_on(settings, tiny_target, tmp_path, capfd):
    first = contents(generate(settings, tiny_target, tmp_path / "g", seed=0, max_length=64))
    other = contents(generate(settings, tiny_target, tmp_path / "g", seed=1, max_length=64))
    assert other != first
    (kept,) = tmp_path.glob("g-*")
    assert contents(kept) == first
    assert f"they are kept as {kept.name}" in " ".join(capfd.readouterr().err.split())
    dates = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    again = generate(settings, tiny_target, tmp_path / "g", seed=0, max_length=64)
    assert contents(again) == first
    assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == dates, "nothing is written again"
    assert "written before" in capfd.readouterr().err
    (back,) = tmp_path.glob("g-*")
    assert contents(back) == other


def test_a_try_that_wrote_no_text_leaves_no_trace(settings, tiny_target, tmp_path):
    settings.prompts = JSONLSettings(path=str(tmp_path / "p.jsonl"))
    (tmp_path / "p.jsonl").write_text('{"odd": 1}')
    with pytest.raises(DataError, match="nothing is left"):
        generate(settings, tiny_target, tmp_path / "g", seed=0, max_length=64)
    (tmp_path / "p.jsonl").write_text('{"prompt": "say"}')
    folder = generate(settings, tiny_target, tmp_path / "g", seed=1, max_length=64)
    assert len(contents(folder)) == 3
    assert not list(tmp_path.glob("g-*"))


@pytest.mark.parametrize("num_prompts", [3, 4, 5])
def test_a_prompt_used_again_is_drawn_at_every_temperature(settings, tiny_target, tmp_path, num_prompts):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(num_prompts)))
    settings.prompts = JSONLSettings(path=str(tmp_path / "p.jsonl"))
    settings.num_records = 4 * num_prompts
    folder = generate(settings, tiny_target, tmp_path / "g", seed=0, max_length=64)
    drawn: dict[str, list[float]] = {}
    for text in contents(folder).values():
        for record in map(json.loads, text.decode().splitlines()):
            drawn.setdefault(record["id"].split("#")[0], []).append(record["sampling"]["temperature"])
    assert len(drawn) == num_prompts
    assert all(sorted(temperatures) == [0.0, 0.3, 0.7, 1.0] for temperatures in drawn.values())


def test_unusable_prompts_are_reported_and_quarantined_with_their_reasons(settings, tiny_target, tmp_path, capfd):
    lines = [{"prompt": "good"}, {"tokens": [99999]}, {"prompt": "x" * 64}, {"text": "short"}, {"prompt": "\ud800"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings.prompts = JSONLSettings(path=str(tmp_path / "p.jsonl"), max_lost_share=0.8)
    folder = generate(settings, tiny_target, tmp_path / "g", seed=0, max_length=64)
    kept = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [one["item"] for one in kept] == lines[1:]
    assert "data.generate.prompts: 4 of 5 items quarantined" in " ".join(capfd.readouterr().err.split())


def test_a_record_is_drawn_by_its_own_stream(tiny_target):
    tasks = [Task(str(i), [5 + i, 6, 7][: 2 + i % 2], Sampling(1.0, top_p=0.95)) for i in range(5)]
    together = continuations(tasks, tiny_target, max_new_tokens=6, seed=0)
    assert [continuations([task], tiny_target, max_new_tokens=6, seed=0)[0] for task in tasks] == together
    assert continuations(tasks, tiny_target, max_new_tokens=6, seed=1) != together
    greedy = continuations([Task("a", [5, 6, 7], Sampling())], tiny_target, max_new_tokens=6, seed=0)[0]
    out = tiny_target.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert greedy == out[0, 3:].tolist()


@pytest.mark.parametrize("kind", ["states", "full", "top_k"])
def test_the_cache_reads_what_was_written_and_agrees_with_the_live_target(settings, tiny_target, tmp_path, kind):
    data_settings = DataSettings(
        sources=[GeneratedSettings(), TextSettings(path=str(tmp_path / "text.txt"))],
        max_length=32,
        generate=settings,
        cache=kind,
        cache_top_k=257,
    )
    generate_texts(data_settings, lambda: tiny_target, tmp_path / "d", seed=0)
    arguments = {"tokenizer": tiny_target.tokenizer, "tokenizer_fingerprint": "x", "seed": 0}
    data = prepare(data_settings, tmp_path / "d", **arguments)
    attach_cache(data, tmp_path / "d", tiny_target, num_records=40, needs=TargetNeeds())
    for step in range(3):
        (batch,) = data.of_step(step, batch_size=8)
        assert batch.target_rows is not None
        trained = (batch.loss_mask_BT & (batch.positions_BT > 0)).flatten().nonzero()[:, 0] - 1
        assert float(len(trained)) == batch.weight_of_step
        live = tiny_target.rows_of(tiny_target.read(batch.tokens_BT, batch.positions_BT, TargetNeeds(final=True)))
        ours, theirs = batch.target_rows.at(trained).log_softmax(-1), live.at(trained).log_softmax(-1)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    cache = data.caches[0]
    assert isinstance(cache, RowCache)
    first = {
        name: np.load(path) for path in (tmp_path / "d" / "0-cache").glob("*-00000.npy") for name in [path.name[:-10]]
    }
    record = cache.layout.shards[0][0]
    for name, array in cache.stored(record, 5).items():
        assert array.numpy().tobytes() == first[name][:5].tobytes()


def test_a_cache_over_its_limit_is_refused_before_writing(settings, tiny_target, tmp_path):
    chosen = DataSettings(
        sources=[TextSettings(path=str(tmp_path / "text.txt"))], max_length=32, cache="full", max_cache_gb=1e-6
    )
    data = prepare(chosen, tmp_path / "d", tokenizer=tiny_target.tokenizer, tokenizer_fingerprint="x", seed=0)
    with pytest.raises(DataError, match="max_cache_gb"):
        attach_cache(data, tmp_path / "d", tiny_target, num_records=10, needs=TargetNeeds())
    assert not list((tmp_path / "d").rglob("*logits*"))


def test_a_step_is_the_same_however_it_is_divided(settings, tiny_target, tmp_path):
    chosen = DataSettings(sources=[TextSettings(path=str(tmp_path / "text.txt"))], max_length=32)
    data = prepare(chosen, tmp_path / "d", tokenizer=tiny_target.tokenizer, tokenizer_fingerprint="x", seed=0)

    def ids(batches):
        return sorted(id for batch in batches for id in batch.record_ids)

    whole = data.of_step(2, batch_size=8)
    for records_per_device, world_size in ((4, 1), (1, 2), (3, 2), (1, 3), (None, 9)):
        parts = [
            batch
            for rank in range(world_size)
            for batch in data.of_step(
                2, batch_size=8, records_per_device=records_per_device, rank=rank, world_size=world_size
            )
        ]
        assert ids(parts) == ids(whole)
        assert {batch.weight_of_step for batch in parts} == {whole[0].weight_of_step}
