"""The cache of target outputs: only what the drafter reads, bit for bit as written, and equal to the live target."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.commands.gen import gen
from drafttrain.config.load import load_recipe
from drafttrain.core.errors import DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.stored.cache_writer import rows_of_texts
from drafttrain.data_gen.stored.stored_states import as_array, as_tensor, states_as
from drafttrain.data_gen.stored.validation_target import CachedTarget
from drafttrain.data_gen.stored.wanted import Wanted
from drafttrain.data_gen.training_data import TrainingData, attach_cache, prepare
from drafttrain.drafters.kangaroo.module import KangarooDrafter, KangarooSettings
from drafttrain.losses import losses
from drafttrain.losses.forward_kl import ForwardKLSettings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import trunk
from drafttrain.target_model.documents import takes_mask
from tests.conftest import byte_tokenizer, random_llama

NEEDS = TargetNeeds(hidden=(0, 1), final=True)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and then it sleeps; " * 30)
    return path


def cached(
    text: Path, target: Target, needs: TargetNeeds, *, distribution: bool = True, folder: str = "d", **settings: Any
) -> TrainingData:
    chosen = DataSettings(sources=[TextSettings(path=str(text))], max_length=32, **settings)
    data = prepare(chosen, text.parent / folder, tokenizer=target.tokenizer, tokenizer_fingerprint="x", seed=0)
    attach_cache(data, text.parent / folder, target, num_records=24, distribution=distribution, needs=needs)
    return data


def files(text: Path, folder: str = "d") -> dict[str, Any]:
    """Return the stored arrays of the first shard by name."""
    paths = sorted((text.parent / folder / "0-cache").glob("*-00000.npy"))
    return {path.name.removesuffix("-00000.npy"): np.load(path) for path in paths}


@pytest.mark.parametrize("kind", ["states", "full", "top_k"])
def test_batches_carry_the_states_of_the_live_target(text, tiny_target, kind):
    data = cached(text, tiny_target, NEEDS, cache=kind)
    for step in range(3):
        (batch,) = data.of_step(step, batch_size=8)
        live = tiny_target.read(batch.tokens_BT, batch.positions_BT, NEEDS)
        real_BT = batch.documents_BT >= 0
        assert batch.target is not None
        assert batch.target.has(NEEDS)
        assert batch.target_rows is not None
        for ours, theirs in [(batch.target.final_BTD, live.final_BTD)] + [
            (batch.target.hidden_BTD[i], live.hidden_BTD[i]) for i in NEEDS.hidden
        ]:
            torch.testing.assert_close(ours[real_BT], theirs[real_BT], rtol=1e-5, atol=1e-5)
            assert not ours[~real_BT].any()


def test_what_is_read_is_what_was_written_bit_for_bit(text, tiny_target):
    data = cached(text, tiny_target, NEEDS, cache="top_k")
    written, cache = files(text), data.caches[0]
    assert cache is not None
    record = cache.layout.shards[0][0]
    length = len(data.stores[0][record].tokens)
    stored = cache.stored(record, length)
    assert set(stored) == set(written) == {"ids", "log_probs", "tail", "hidden_0", "hidden_1", "final"}
    for name, tensor in stored.items():
        assert tensor.numpy().tobytes() == written[name][:length].tobytes()


@pytest.mark.parametrize(
    ("kind", "distribution", "needs", "names"),
    [
        ("states", True, TargetNeeds(), {"final"}),
        ("states", True, TargetNeeds(final=True), {"final"}),  # stored once for both
        ("states", True, TargetNeeds(hidden=(1,)), {"final", "hidden_1"}),
        ("states", False, TargetNeeds(hidden=(1,)), {"hidden_1"}),
        ("full", True, TargetNeeds(final=True), {"logits", "final"}),
        ("top_k", True, TargetNeeds(hidden=(2,)), {"ids", "log_probs", "tail", "hidden_2"}),
        ("states", False, TargetNeeds(), set()),
        ("none", True, NEEDS, set()),
    ],
)
def test_only_needed_outputs_are_stored_and_carried_by_batches(text, tiny_target, kind, distribution, needs, names):
    data = cached(text, tiny_target, needs, distribution=distribution, cache=kind)
    assert set(files(text)) == names
    (batch,) = data.of_step(0, batch_size=4)
    assert (batch.target_rows is not None) == (distribution and kind != "none")
    if names:
        assert batch.target is not None
        assert set(batch.target.hidden_BTD) == set(needs.hidden)
        assert (batch.target.final_BTD is not None) == needs.final


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_its_size_is_printed_before_it_is_written_and_limited(text, tiny_target, dtype, capfd):
    data = cached(text, tiny_target, NEEDS, cache="states", cache_dtype=dtype)
    cache = data.caches[0]
    assert cache is not None
    tokens = sum(len(data.stores[0][record].tokens) for record in cache.layout.sizes)
    size = sum(array.nbytes for array in files(text).values())
    assert size == tokens * cache.wanted.bytes_a_row(tiny_target) == tokens * 3 * 32 * (4 if dtype == "float32" else 2)
    message = " ".join(capfd.readouterr().err.split())
    assert "distribution (states), hidden state 0, hidden state 1, final state" in message
    limit = (size - 1) / 1e9
    with pytest.raises(DataError, match=r"data\.max_cache_gb allows"):
        cached(text, tiny_target, NEEDS, folder="e", cache="states", cache_dtype=dtype, max_cache_gb=limit)
    assert not list((text.parent / "e").glob("0-cache/*.npy"))
    cached(text, tiny_target, NEEDS, folder="e", cache="states", cache_dtype=dtype, max_cache_gb=(size + 1) / 1e9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bytes_hold_the_rounded_state(text, tiny_target, dtype):
    whole, half = (
        cached(text, tiny_target, NEEDS, folder=name, cache="states", cache_dtype=name) for name in ("float32", dtype)
    )
    a, b = (data.of_step(0, batch_size=8)[0].target.hidden_BTD[1] for data in (whole, half))
    assert torch.equal(a.to(getattr(torch, dtype)).float(), b)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_states_keep_their_type_until_they_are_used(text, tiny_target, dtype):
    data = cached(text, tiny_target, NEEDS, cache="states", cache_dtype=dtype)
    (batch,) = data.of_step(0, batch_size=8)
    states = [batch.target.final_BTD, *batch.target.hidden_BTD.values()]
    assert {state.dtype for state in states} == {getattr(torch, dtype)}
    # The distribution is computed from the same tensor, so a batch takes it to the device once.
    moved = []
    batch.each(lambda tensor: moved.append(tensor.data_ptr()) or tensor)
    assert len(set(moved)) == len(moved) == 4 + len(states)
    index_N = (batch.documents_BT >= 0).flatten().nonzero()[:, 0]
    final_ND = batch.target.final_BTD.flatten(0, 1)[index_N].float()
    assert torch.equal(batch.target_rows.at(index_N), tiny_target.model.get_output_embeddings()(final_ND))


def test_only_needed_arrays_are_read(text, tiny_target):
    data = cached(text, tiny_target, NEEDS, cache="top_k")
    cache = data.caches[0]
    record = min(cache.layout.sizes)
    for shard in cache._shards:
        shard["hidden_0"] = shard["ids"] = None
    assert set(cache.stored(record, 3, ["final", "tail"])) == {"final", "tail"}
    text_T = data.stores[0][record].tokens
    tokens_BT, positions_BT = torch.tensor(text_T)[None], torch.arange(len(text_T))[None]
    stored = CachedTarget(tiny_target, [*([] for _ in range(record)), text_T], cache)
    seen, live = (
        one.read(tokens_BT, positions_BT, TargetNeeds(hidden=(1,), final=True)) for one in (stored, tiny_target)
    )
    torch.testing.assert_close(seen.hidden_BTD[1], live.hidden_BTD[1], rtol=1e-5, atol=1e-5)


def test_a_state_that_overflows_its_type_is_refused():
    state_ND = torch.tensor([[1e6, 1.0]])
    with pytest.raises(DataError, match="overflows float16"):
        states_as("float16", state_ND)
    assert torch.equal(as_tensor(as_array(states_as("bfloat16", state_ND)), "bfloat16"), state_ND.bfloat16())


def test_another_need_rebuilds_the_cache(text, tiny_target):
    cached(text, tiny_target, TargetNeeds(hidden=(0,)), cache="states")
    before = files(text)["hidden_0"]
    cached(text, tiny_target, TargetNeeds(hidden=(1,)), cache="states")
    assert set(files(text)) == {"hidden_1", "final"}
    assert not np.array_equal(files(text)["hidden_1"], before)


def curve(text: Path, target: Target, *, cache: str, **cached_as: Any) -> tuple[list[float], int]:
    """Train a Kangaroo adapter for some steps; return its losses and how often the target was run."""
    from drafttrain.training.run import train
    from drafttrain.training.settings import TrainSettings

    torch.manual_seed(0)
    drafter = KangarooDrafter.create(KangarooSettings(exit_layer=1), target=target, tokenizer=None)
    data = cached(text, target, drafter.needs(), folder=cache, cache=cache, **cached_as)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    takes_mask(target.model)  # is tried once a model, by running it
    handle = trunk(target.model).register_forward_pre_hook(count)
    settings = TrainSettings(max_steps=6, batch_size=4, warmup_steps=1, log_every_steps=1, eval_every_steps=0, lr=1e-2)
    settings.loggers = ["csv"]
    train(
        drafter,
        losses.build(ForwardKLSettings()),
        target=target,
        of_step=lambda step: data.of_step(step, batch_size=4),
        estimate=None,
        settings=settings,
        vocab_size=target.num_tokens,
        folder=text.parent / f"run-{cache}",
    )
    handle.remove()
    with (text.parent / f"run-{cache}" / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)], runs


def test_training_from_the_cache_equals_training_on_the_live_target(text, tiny_target):
    live, runs = curve(text, tiny_target, cache="none")
    stored, stored_runs = curve(text, tiny_target, cache="states")
    assert (runs, stored_runs) == (6, 0)
    assert stored == pytest.approx(live, abs=1e-5)
    assert len({round(loss, 4) for loss in live}) == 6


def test_a_drafter_whose_needs_cannot_be_stored_is_refused(text, tiny_folder, tiny_target, tmp_path, monkeypatch):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"name: tiny\ntarget: {{model: {tiny_folder}}}\ndrafter: {{kind: kangaroo, exit_layer: 1}}\nloss: {{kind: forward_kl}}\n"
        f"data: {{max_length: 32, cache: states, sources: [{{kind: text, path: {text}}}]}}\n"
    )
    monkeypatch.setattr(KangarooDrafter, "needs", lambda self: TargetNeeds(logits=True))
    with pytest.raises(DataError, match=r"data\.cache: kangaroo: .*logits of every token; set data\.cache: none"):
        gen(load_recipe(recipe), tmp_path / "run")


def test_a_cache_whose_plan_an_earlier_version_wrote_is_kept(text, tiny_target):
    cached(text, tiny_target, NEEDS, cache="states")
    folder = text.parent / "d" / "0-cache"
    plan = json.loads((folder / "plan.json").read_text())
    plan["wanted"] = {"law" if key == "distribution" else key: value for key, value in plan["wanted"].items()}
    (folder / "plan.json").write_text(json.dumps(plan))
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    cached(text, tiny_target, NEEDS, cache="states")
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    cached(text, tiny_target, NEEDS, cache="full")
    assert list(folder.glob("logits-*.npy"))


def test_the_rows_of_a_text_do_not_depend_on_the_texts_that_are_read_with_it():
    model = random_llama(hidden_size=16).double()
    target = Target(model, byte_tokenizer(), name="t", fingerprint="")
    texts = [[1, 2, 3], list(range(40, 60)), [7], list(range(90, 101)), [4, 5]]
    wanted = Wanted(distribution="full", states=TargetNeeds(hidden=(1,), final=True), top_k=0, dtype="float32")
    counts: list[int] = []
    records = [Record("", text, [True] * len(text)) for text in texts]
    rows, _ = rows_of_texts(records, target, wanted, skipped=[0] * len(texts), read=counts.append)
    assert sum(counts) == sum(map(len, texts)), "every token is reported, padding is not"
    begin = 0
    for text in texts:
        with torch.no_grad():
            alone = model(torch.tensor([text]), output_hidden_states=True)
        span = slice(begin, begin := begin + len(text))
        for name, state in (
            ("logits", alone.logits),
            ("hidden_1", alone.hidden_states[1]),
            ("final", alone.hidden_states[-1]),
        ):
            np.testing.assert_allclose(rows[name][span], state[0].float().numpy(), rtol=0, atol=1e-6)
