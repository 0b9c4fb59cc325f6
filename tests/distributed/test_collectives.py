"""Waiting for other processes while they wait is refused."""

from __future__ import annotations

import pytest

from drafttrain.distributed.collectives import first_before_others, own_share, shared, wait_for_all


def test_waiting_inside_first_before_others_is_refused_even_in_one_process() -> None:
    message = "waits for the others while it writes, and they wait for that"
    with pytest.raises(AssertionError, match=message), first_before_others("it writes"):
        wait_for_all("they are done")
    with first_before_others("it writes"):
        for wait in (lambda: shared(1), lambda: own_share([1]), first_before_others("it reads").__enter__):
            with pytest.raises(AssertionError, match="while it writes"):
                wait()
    assert shared(1) == [1], "and after it is allowed again"
