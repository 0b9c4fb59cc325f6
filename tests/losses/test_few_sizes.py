"""Rows of padding in products change no loss and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.core import few_sizes
from drafttrain.losses import head_products, losses
from tests.losses.test_fused import SOME, assert_same, gradients


def test_a_size_is_at_most_a_sixteenth_larger_and_there_are_few():
    sizes = [few_sizes.few_sizes(count) for count in range(5000)]
    assert sizes[:33] == list(range(33))
    assert all(count <= size <= count * 17 / 16 for count, size in enumerate(sizes))
    assert len(set(sizes)) < 160


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Round all numbers of rows up to a multiple of 7; return the rows of the head's products."""
    found: list[int] = []
    linear = head_products.linear

    def watched(rows: Any, *others: Any) -> Any:
        found.append(len(rows))
        return linear(rows, *others)

    monkeypatch.setattr(few_sizes, "is_compiled_by_size", lambda *_: True)
    monkeypatch.setattr(few_sizes, "few_sizes", lambda count: -(-count // 7) * 7)
    monkeypatch.setattr(head_products, "linear", watched)
    return found


@pytest.mark.parametrize("kind", ["ce", "lk_hybrid", "tvdpp"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_padded_products_give_the_same_loss_and_gradients(kind, chunk, seen):
    settings = losses.entry(kind).settings()
    plain = gradients(settings, fused=False, vocabulary=SOME)
    padded = gradients(settings, fused=True, vocabulary=SOME, chunk=chunk)
    assert_same(padded, plain, rtol=1e-9, atol=1e-11)
    assert seen
    assert all(rows % 7 == 0 for rows in seen)


def test_control_padding_that_is_not_zero_changes_the_gradients(seen, monkeypatch):
    settings = losses.entry("ce").settings()
    plain = gradients(settings, fused=False, vocabulary=SOME)
    pad = few_sizes.pad
    monkeypatch.setattr(few_sizes, "pad", lambda rows, added: pad(rows, added, value=1.0))
    with pytest.raises(AssertionError):
        assert_same(gradients(settings, fused=True, vocabulary=SOME), plain, rtol=1e-3, atol=1e-3)


def test_only_half_types_on_a_cpu_are_padded():
    rows = torch.ones(33, 2)
    assert len(few_sizes.in_few_sizes(rows)) == 33
    assert len(few_sizes.in_few_sizes(rows.bfloat16())) == 34
    assert len(few_sizes.in_few_sizes(rows.bfloat16().to("meta"))) == 33
