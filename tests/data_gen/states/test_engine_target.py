"""A target whose blocks run in another process returns the states of the target itself, layer by layer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafttrain.core.errors import DataError
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.settings import DataSettings
from drafttrain.data_gen.sources.text import TextSettings
from drafttrain.data_gen.states import TextStates, engine_target
from drafttrain.data_gen.states.builtin import BuiltinSource, BuiltinStates
from drafttrain.data_gen.states.engine_target import EngineTarget
from drafttrain.data_gen.training_data import attach_cache, prepare
from drafttrain.drafters import drafters
from drafttrain.losses import losses
from drafttrain.losses.forward_kl import ForwardKLSettings
from drafttrain.target_model import Target, TargetSettings
from drafttrain.target_model.absent_target import AbsentTarget
from drafttrain.training.distill import DistillModule
from drafttrain.training.flops import distill_flops
from drafttrain.training.settings import TrainSettings
from tests.data_gen.states.plain_source import PlainSource, PlainStates

NEEDS = TargetNeeds(hidden=(0, 1, 2, 3), final=True, logits=True)
"""Everything that a target of three blocks has."""

TOKENS_BT = torch.arange(1, 81).view(2, 40)
POSITIONS_BT = torch.cat([torch.arange(25), torch.arange(15)]).expand(2, -1)
"""Two documents a row."""


@pytest.fixture(scope="module")
def folder(save_llama: Any) -> Path:
    return save_llama(num_layers=3)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Target:
    return Target.load(TargetSettings(model=str(folder)))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that makes the other process return other layers."""
    return tmp_path_factory.mktemp("faults") / "shift"


@pytest.fixture(scope="module")
def started(folder: Path, faults: Path) -> Any:
    """The target with its blocks in another process."""
    settings = TargetSettings(model=str(folder))
    target = PlainSource(PlainStates(str(faults))).target(settings, max_length=64, while_training=False)
    yield target
    target.release()


@pytest.fixture
def theirs(started: Any, faults: Path) -> Any:
    """The same, as it was."""
    yield started
    faults.unlink(missing_ok=True)
    started._compared = False


def differences(one: Any, other: Any) -> dict[int, float]:
    """Return by layer how far states are apart, relative to their size."""
    return {
        index: float((state - other.hidden_BTD[index]).norm() / state.norm()) for index, state in one.hidden_BTD.items()
    }


def test_every_layer_is_that_of_the_target_itself(ours, theirs):
    live, read = (target.read(TOKENS_BT, POSITIONS_BT, NEEDS) for target in (ours, theirs))
    assert max(differences(live, read).values()) < 1e-5
    for name in ("final_BTD", "logits_BTV"):
        torch.testing.assert_close(getattr(read, name), getattr(live, name), rtol=1e-4, atol=1e-4)
    last = theirs.read(TOKENS_BT, POSITIONS_BT, TargetNeeds(hidden=(-1,)))
    assert torch.equal(last.hidden_BTD[-1], read.hidden_BTD[3])


@pytest.mark.parametrize("shift", [-1, 1])
def test_layers_that_are_off_by_one_differ_and_are_refused_at_the_top(ours, theirs, faults, shift):
    faults.write_text(str(shift))
    live, read = (target.read(TOKENS_BT, POSITIONS_BT, TargetNeeds(hidden=(1, 2))) for target in (ours, theirs))
    assert min(differences(live, read).values()) > 0.01
    with pytest.raises(DataError, match="the engine runs another model, or returns other layers"):
        theirs.read(TOKENS_BT, POSITIONS_BT, NEEDS)


def test_only_requested_layers_are_returned(theirs):
    assert not theirs.read(TOKENS_BT, POSITIONS_BT, TargetNeeds()).hidden_BTD
    read = theirs.read(TOKENS_BT, POSITIONS_BT, TargetNeeds(hidden=(2,)))
    assert (set(read.hidden_BTD), read.final_BTD, read.logits_BTV) == ({2}, None, None)


class Written:
    """An engine whose states are given."""

    def __init__(self, *states_TLD: torch.Tensor) -> None:
        self._states = states_TLD
        self.closed = 0

    def read(self, texts, layers):
        """Yield them."""
        yield from (TextStates(states_TLD, 0) for states_TLD in self._states)

    def close(self) -> None:
        """Count."""
        self.closed += 1


def test_states_of_another_shape_are_refused(folder):
    settings = TargetSettings(model=str(folder))
    target = EngineTarget(AbsentTarget.load(settings), settings, Written(torch.zeros(24, 1, 32)), while_training=False)
    with pytest.raises(
        DataError, match=r"states of shape \[24, 1, 32\] for a text of 25 tokens, expected \[25, 1, 32\]"
    ):
        target.read(TOKENS_BT[:1, :25], POSITIONS_BT[:1, :25], TargetNeeds(hidden=(1,)))


def test_the_engine_stays_only_for_a_training_that_reads_it(folder):
    settings = TargetSettings(model=str(folder))
    for while_training, closed in ((True, 0), (False, 1)):
        engine = Written()
        EngineTarget(AbsentTarget.load(settings), settings, engine, while_training=while_training).release()
        assert engine.closed == closed


class Own:
    """An engine that reads a loaded target, and notes the calls."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.began = threading.Event()
        self.texts: list[list[Any]] = []

    def read(self, texts, layers):
        """Yield the states of each text."""
        self.texts.append(list(texts))
        self.began.set()
        for text in texts:
            tokens_BT, positions_BT = torch.tensor([text]), torch.arange(len(text))[None]
            seen = self._target.read(tokens_BT, positions_BT, TargetNeeds(hidden=tuple(layers), logits=True))
            states_TLD = torch.stack([seen.hidden_BTD[layer][0] for layer in layers], dim=1)
            yield TextStates(states_TLD, int(seen.logits_BTV[0, -1].argmax()))

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def own(ours, folder):
    """An engine and the target that it reads for."""
    settings, engine = TargetSettings(model=str(folder)), Own(ours)
    return engine, EngineTarget(AbsentTarget.load(settings), settings, engine, while_training=True)


def test_a_batch_is_read_ahead_once_and_any_other_when_it_is_asked_for(ours, own):
    engine, target = own
    needs = TargetNeeds(hidden=(1,), final=True)
    live = ours.read(TOKENS_BT, POSITIONS_BT, needs)
    target.read_ahead(TOKENS_BT, POSITIONS_BT, needs)
    assert engine.began.wait(60), "before anybody reads"
    read = target.read(TOKENS_BT, POSITIONS_BT, needs)
    torch.testing.assert_close(read.final_BTD, live.final_BTD, rtol=1e-4, atol=1e-4)
    assert len(engine.texts) == 1
    for tokens_BT, other in ((TOKENS_BT, needs), (TOKENS_BT, TargetNeeds(hidden=(2,))), (TOKENS_BT + 1, needs)):
        target.read_ahead(TOKENS_BT, POSITIONS_BT, TargetNeeds(hidden=(1,)))
        target.read(tokens_BT, POSITIONS_BT, other)
    # What is read ahead already is not read again.
    assert len(engine.texts) == 5


def test_no_micro_batch_of_a_long_step_is_read_twice(own, monkeypatch):
    engine, target = own
    monkeypatch.setattr(engine_target, "MOST_AHEAD", 2)
    needs, step = TargetNeeds(hidden=(1,)), [TOKENS_BT + number for number in range(4)]
    for tokens_BT in step:
        target.read_ahead(tokens_BT, POSITIONS_BT, needs)
    for tokens_BT in step:
        target.read(tokens_BT, POSITIONS_BT, needs)
    assert len(engine.texts) == 4


def test_a_training_reads_the_micro_batches_of_the_next_step_ahead(own):
    engine, target = own
    entry = drafters.entry("eagle3")
    drafter = entry.component.create(entry.settings(num_steps=1), target=target, tokenizer=target.tokenizer)
    loss, settings = losses.build(ForwardKLSettings()), TrainSettings()
    module = DistillModule(drafter, loss, target=target, settings=settings, vocab_size=target.num_tokens)
    records = [Record(str(n), list(range(n, n + 9)), [True] * 9) for n in (1, 30)]
    batch, _ = pack(records, width=20, weight_of_step=1.0)
    planned = module.planned(batch)
    assert engine.began.wait(60)
    read = module._with_target(planned)
    assert len(engine.texts) == 1, "and not again in the step"
    # The engine's blocks are not this process's operations; those of the loaded target are.
    counted = module.flops
    assert counted == distill_flops(drafter, target, batch.shape, reads=False, head=True)
    assert counted < distill_flops(drafter, target, batch.shape, reads=True, head=True)
    assert read.target.has(drafter.needs())
    assert module.planned(read).target is read.target
    assert not target._ahead, "a micro-batch that has all is not read"


@pytest.mark.parametrize(("cache", "dtype"), [("states", "float32"), ("states", "bfloat16"), ("top_k", "float32")])
def test_the_cache_has_the_same_files_and_another_source_keeps_it(folder, theirs, tmp_path, cache, dtype):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and then it sleeps; " * 30)
    chosen = DataSettings(
        sources=[TextSettings(path=str(tmp_path / "text.txt"))], max_length=32, cache=cache, cache_dtype=dtype
    )

    def cached(name: str, target: Target) -> dict[str, Path]:
        data = prepare(chosen, tmp_path / name, tokenizer=target.tokenizer, tokenizer_fingerprint="x", seed=0)
        needs = TargetNeeds(hidden=(0, 2), final=True)
        attach_cache(data, tmp_path / name, target, num_records=24, needs=needs)
        return {path.name: path for path in sorted((tmp_path / name / "0-cache").iterdir())}

    builtin = BuiltinSource(BuiltinStates()).target(
        TargetSettings(model=str(folder)), max_length=32, while_training=False
    )
    own, made = cached("own", builtin), cached("made", theirs)
    assert set(own) == set(made) >= {"plan.json", "cache.json", "hidden_0-00000.npy", "hidden_2-00000.npy"}
    assert own["plan.json"].read_bytes() == made["plan.json"].read_bytes()
    for name, path in own.items():
        if path.suffix != ".npy":
            continue
        one, other = np.load(path), np.load(made[name])
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if one.dtype == np.float32:
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4)
    times = {name: path.stat().st_mtime_ns for name, path in made.items() if path.suffix == ".npy"}
    kept = cached("made", builtin)
    assert {name: path.stat().st_mtime_ns for name, path in kept.items() if path.suffix == ".npy"} == times
