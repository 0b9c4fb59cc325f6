"""Clocks: what an event is at another batch and context, rooflines by hand, fits, and the end of the gain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from drafttrain.core.device_time import Span
from drafttrain.core.generations import ForwardEvent, ForwardShape, Work
from drafttrain.core.gpus import gpu_named
from drafttrain.core.proposals import Budget
from drafttrain.eval.advice import Candidate, Device, Recorded
from drafttrain.eval.clock import (
    DATA_SHEET,
    CalibratedClock,
    Efficiency,
    Host,
    Roofline,
    fitted,
    measured,
    roofline_of,
    serial_seconds,
)
from drafttrain.eval.decoding_memory import DecodingMemory
from drafttrain.eval.interval import Interval
from drafttrain.eval.lone_rounds import LoneRound
from drafttrain.target_model.cached_lm import CachedLM
from tests.conftest import random_llama

PARAMETERS, WIDTH, LAYERS, COLUMN = 1_000_000, 128, 4, 1024


def event(tokens: int, context: int, *, model: str = "target", parameters: int = PARAMETERS) -> ForwardEvent:
    """Return the call of one sequence of a model with 16-bit weights."""
    shape = ForwardShape.of([tokens], [context], num_layers=LAYERS, head_rows=tokens)
    work = Work(
        weight_bytes=2 * parameters,
        cache_bytes=COLUMN * (context + tokens),
        product_flops=2 * parameters * tokens,
        attention_flops=4 * WIDTH * LAYERS * shape.pairs,
    )
    return ForwardEvent(model, shape, work, Span.of(0.0))


def recorded(tokens: list[list[int]]) -> list[ForwardEvent]:
    """Return the prefill and the call after it that a real model reports for these sequences, with 3 new tokens each."""
    events: list[ForwardEvent] = []
    lm = CachedLM(random_llama().double(), name="target", listener=events.append)
    lm.begin(tokens)
    lm.forward([[1, 2, 3]] * len(tokens))
    return events


def test_a_forward_at_another_batch_and_context_is_the_one_that_would_be_recorded() -> None:
    alone, together = recorded([[1] * 5])[1], recorded([[1] * 20] * 3)[1]
    moved = alone.at(batch=3, context=20)
    assert (moved.shape, moved.work) == (together.shape, together.work)
    assert alone.at(batch=3, context=19).work != together.work
    assert alone.at(batch=2, context=20).work != together.work
    halved = alone.at(batch=1, context=5, width=0.5).work
    assert 2 * halved.bytes_read == alone.work.bytes_read
    assert halved.flops == alone.work.flops


def test_a_roofline_by_hand() -> None:
    gpu = gpu_named("h100")
    assert gpu is not None
    one = event(1, 100)
    reads = (2 * PARAMETERS + COLUMN * 101) / 3350e9
    assert roofline_of(gpu, DATA_SHEET)(one) == pytest.approx(reads, rel=1e-12)
    assumed = roofline_of(gpu, Efficiency(0.7, 0.5, 8e-6))
    assert assumed(one) == pytest.approx(reads / 0.7 + LAYERS * 8e-6, rel=1e-12)
    many = event(4096, 0)
    flops = 2 * PARAMETERS * 4096 + 4 * WIDTH * LAYERS * 4096 * 4097 // 2
    assert roofline_of(gpu, DATA_SHEET)(many) == pytest.approx(flops / 989.4e12, rel=1e-12)
    in_turn = Roofline(1e9, 1e12, overlaps=False)
    assert in_turn(one) == pytest.approx(one.work.bytes_read / 1e9 + one.work.flops / 1e12, rel=1e-12)
    assert Roofline(1e9, 1e12)(one) < in_turn(one)


def test_the_turning_point_of_the_roofline_is_where_the_note_puts_it() -> None:
    """2 bytes and 2 operations a parameter: n* = shares x peak / bandwidth tokens, 211 for the assumed H100."""
    gpu = gpu_named("h100")
    assert gpu is not None
    clock = roofline_of(gpu, Efficiency(layer_seconds=0.0))

    def alone(tokens: int) -> float:
        one = event(tokens, 0)
        return clock(replace(one, work=replace(one.work, cache_bytes=0, attention_flops=0)))

    assert alone(210) == alone(1)
    assert alone(212) > alone(1)


def test_a_fit_predicts_forwards_that_it_was_not_fitted_to() -> None:
    true = Roofline(2e9, 3e11, call_seconds=4e-4, overlaps=False)

    def timed(tokens: int, context: int, clock: Roofline) -> ForwardEvent:
        one = event(tokens, context)
        return replace(one, span=Span.of(clock(one)))

    found = fitted([timed(tokens, context, true) for tokens in (1, 8, 64) for context in (10, 200)])
    for tokens, context in ((2, 30), (5, 100), (9, 400)):
        assert found(event(tokens, context)) == pytest.approx(true(event(tokens, context)), rel=1e-6)
        # A machine that reads half as fast: a fit that ignored its times would not notice.
        slower = replace(true, bandwidth=1e9)
        assert found(event(tokens, context)) != pytest.approx(slower(event(tokens, context)), rel=0.01)


def test_measured_times_are_those_of_the_events() -> None:
    assert measured(replace(event(1, 1), span=Span.of(0.25))) == 0.25


def test_the_first_blocks_of_the_target_are_timed_as_the_target() -> None:
    clock = CalibratedClock({"target": Roofline(1.0, 1.0), "drafter": Roofline(2.0, 2.0)})
    first = event(1, 5, model="target's first blocks")
    assert clock(first) == clock(event(1, 5)) != clock(event(1, 5, model="drafter"))


MEMORY = DecodingMemory(2 * PARAMETERS, [event(1, 9)], vocab_size=1000, element_bytes=2, sampled=False)


def chain(count: int, tau: float, *, drafter: int) -> Candidate:
    drafting = [event(1, 100 + place, model="drafter", parameters=drafter) for place in range(count)]
    interval = Interval(tau, tau - 0.1, tau + 0.1, 8)
    rounds = [LoneRound([*drafting, event(count + 1, 100)], Budget(count, count), 0.0)]
    return Candidate({"kind": "fixed"}, interval, True, rounds)


def test_the_prediction_is_the_formula_of_speculative_decoding() -> None:
    """Memory-bound and without overhead: tau / (c K + 1), c the ratio of the models' sizes."""
    gpu = gpu_named("h100")
    assert gpu is not None
    device = Device("h100", roofline_of(gpu, DATA_SHEET), "data sheet")
    said = Recorded([chain(4, 3.0, drafter=PARAMETERS // 10)], event(1, 100), MEMORY)
    found = said.predicted(said.candidates[0], device, batch=1, context=0)
    assert found.speedup.value == pytest.approx(3.0 / (0.1 * 4 + 1), rel=0.02)
    assert found.speedup.low == pytest.approx(found.speedup.value * 2.9 / 3.0)
    slower = replace(device, host=Host(1e-6, 1e-7))
    assert said.predicted(said.candidates[0], slower, batch=1, context=0).speedup.value < found.speedup.value
    (alone,) = serial_seconds([[event(1, 0)]], device.clock)
    assert found.plain_ms == pytest.approx(1000 * alone)


def test_a_batch_that_does_not_fit_is_marked() -> None:
    gpu = gpu_named("t4")
    assert gpu is not None
    device = Device("t4", roofline_of(gpu, DATA_SHEET), "data sheet", memory_bytes=gpu.memory_bytes)
    said = Recorded([chain(4, 3.0, drafter=1)], event(1, 100), MEMORY)
    # 1,024 bytes a token, so of 16 GB less 2 for the context 32k tokens each take a 417th.
    small, large = (said.predicted(said.candidates[0], device, batch=batch, context=32768) for batch in (400, 430))
    assert small.fits
    assert not large.fits
    assert large.gigabytes > 14 > small.gigabytes


def test_the_gain_ends_where_a_scan_of_all_batches_finds_it() -> None:
    gpu = gpu_named("h100")
    assert gpu is not None
    device = Device("h100", roofline_of(gpu, Efficiency(layer_seconds=0.0)), "assumed")
    said = Recorded(
        [chain(k, 1 + 0.55 * k**0.8, drafter=PARAMETERS // 20) for k in (1, 2, 4, 8)], event(1, 100), MEMORY
    )
    end = said.end_of_gain(device, context=0)
    gains = [
        max(one.speedup.value for one in said.surface([device], batches=[batch], contexts=[0]))
        for batch in range(1, 600)
    ]
    assert end == next(batch for batch, gain in enumerate(gains, 1) if gain <= 1)
    assert 1 < end < 600
    free_drafts = replace(device, clock=lambda one: float(one.model == "target"))
    assert said.end_of_gain(free_drafts, context=0) is None
