"""Micro-batches are made one step ahead by a thread, which ends with the training however that ends."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drafttrain.core.batches import DraftBatch
from drafttrain.core.errors import Interrupted
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.drafters.causal_lm.module import CausalLMDrafter
from drafttrain.losses import losses
from drafttrain.target_model import Target
from drafttrain.training.loader import Steps
from drafttrain.training.run import train
from drafttrain.training.settings import TrainSettings
from tests.conftest import random_llama

WAIT_SECONDS = 30


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_they_are_those_of_each_step_in_their_order() -> None:
    steps = Steps(lambda step: [(step, 0), (step, 1)], start=3, stop=6)
    assert list(steps) == [(step, part) for step in (3, 4, 5) for part in (0, 1)]
    assert list(Steps(lambda step: [step], start=4, stop=4)) == []


def test_the_next_step_is_made_while_one_is_read_and_none_behind_it() -> None:
    made = [threading.Event() for _ in range(4)]

    def of_step(step: int) -> list[int]:
        made[step].set()
        return [step, step]

    steps = Steps(of_step, start=0, stop=4)
    batches = iter(steps)
    assert next(batches) == 0
    assert made[1].wait(WAIT_SECONDS)
    assert next(batches) == 0
    assert not made[2].is_set()
    assert next(batches) == 1
    assert made[2].wait(WAIT_SECONDS)
    assert not made[3].is_set()
    steps.close()
    assert next(batches, "ended") == "ended"


def test_an_error_is_raised_where_its_step_is_asked_for_with_the_place_that_raised_it() -> None:
    def of_a_broken_shard(step: int) -> list[int]:
        if step == 2:
            raise OSError("a shard cannot be read")
        return [step]

    batches = iter(Steps(of_a_broken_shard, start=0, stop=4))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="a shard cannot be read") as caught:
        next(batches)
    assert "of_a_broken_shard" in "".join(traceback.format_exception(caught.value))


def fit(folder: Path, target: Target, *, at_step: Callable[[int], None], **settings: Any) -> list[str]:
    """Train for four steps; return the names of the threads that made them."""
    threads = []

    def of_step(step: int) -> list[DraftBatch]:
        threads.append(threading.current_thread().name)
        at_step(step)
        return [pack([Record("a", range(1, 9), [True] * 8)], width=8, weight_of_step=7.0, step=step)[0]]

    train(
        CausalLMDrafter(random_llama(seed=1, num_layers=1)),
        losses.build(losses.entry("forward_kl").settings()),
        target=target,
        of_step=of_step,
        estimate=None,
        settings=TrainSettings(
            max_steps=4, batch_size=1, warmup_steps=0, loggers=["csv"], eval_every_steps=0, **settings
        ),
        vocab_size=257,
        folder=folder,
    )
    return threads


def test_training_reads_them_from_the_thread(tiny_target: Target, tmp_path: Path) -> None:
    threads = fit(tmp_path, tiny_target, at_step=lambda step: None)
    assert len(threads) == 4
    assert threading.current_thread().name not in threads


def test_the_thread_ends_with_a_training_that_fails(tiny_target: Target, tmp_path: Path) -> None:
    def at_step(step: int) -> None:
        if step == 2:
            raise ValueError("record 7 has no tokens")

    with pytest.raises(ValueError, match="record 7 has no tokens"):
        fit(tmp_path, tiny_target, at_step=at_step)


def test_the_thread_ends_with_a_training_that_is_asked_to_stop(tiny_target: Target, tmp_path: Path) -> None:
    def at_step(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="of 4: run the same command to continue"):
        fit(tmp_path, tiny_target, at_step=at_step)
    assert len(fit(tmp_path, tiny_target, at_step=lambda step: None)) < 4, "it continues behind the steps that it took"


def test_a_resumed_training_reads_what_one_that_never_stopped_reads(tiny_target: Target, tmp_path: Path) -> None:
    def at_step(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    fit(tmp_path / "whole", tiny_target, at_step=lambda step: None, log_every_steps=1)
    with pytest.raises(Interrupted):
        fit(tmp_path / "resumed", tiny_target, at_step=at_step, log_every_steps=1)
    fit(tmp_path / "resumed", tiny_target, at_step=lambda step: None, log_every_steps=1)
    whole, resumed = ((tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
