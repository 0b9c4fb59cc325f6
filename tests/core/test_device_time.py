"""A span measures the time between its start and its end, whenever it is read."""

import time

import pytest
import torch

from drafttrain.core.device_time import Span


def test_a_span_covers_only_the_work_inside_it() -> None:
    outer = Span(torch.device("cpu"))
    inner = Span(torch.device("cpu"))
    time.sleep(0.01)
    inner.end()
    time.sleep(0.01)
    outer.end()
    assert inner.seconds >= 0.01
    assert inner.seconds + 0.01 <= outer.seconds


def test_a_span_that_has_not_ended_has_no_time() -> None:
    with pytest.raises(AssertionError, match="`end` first"):
        _ = Span(torch.device("cpu")).seconds
