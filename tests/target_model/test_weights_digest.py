"""The digest of weights in memory changes with every weight, and not with the memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from drafttrain.core.errors import DrafttrainError
from drafttrain.target_model import Target, weights_digest
from drafttrain.target_model.weights_digest import weights_digest as digest_of
from drafttrain.training.callbacks import FrozenTarget
from tests.conftest import byte_tokenizer, random_llama


def module(**tensors: Tensor) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_buffer(name, tensor)
    return made


TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", [0, 5, 10])
def test_one_changed_number_changes_the_digest(dtype: torch.dtype, place: int) -> None:
    numbers_N = torch.zeros(11, dtype=dtype)
    before = digest_of(module(weight=numbers_N.clone()))
    numbers_N[place] = 1
    assert digest_of(module(weight=numbers_N)) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(0),
        lambda x: torch.nextafter(x, torch.tensor(float("inf"))),
        lambda x: x.view(4, 2),
        lambda x: x.view(torch.int32),
        lambda x: torch.cat([x, x.new_zeros(1)]),
    ],
)
def test_order_last_bits_shape_type_and_size_change_the_digest(change: Callable[[Tensor], Tensor]) -> None:
    numbers_N = torch.arange(8.0)
    assert digest_of(module(weight=change(numbers_N))) != digest_of(module(weight=numbers_N))
    assert digest_of(module(other=numbers_N)) != digest_of(module(weight=numbers_N))


def test_memory_layout_does_not_change_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers_NM = torch.randn(7, 5).bfloat16()
    held_X = torch.zeros(36).bfloat16()
    held_X[1:] = numbers_NM.flatten()
    elsewhere = [numbers_NM.T.contiguous().T, held_X[1:].view(7, 5)]
    expected = digest_of(module(weight=numbers_NM))
    assert all(digest_of(module(weight=one)) == expected for one in elsewhere)
    monkeypatch.setitem(weights_digest.WORDS_AT_ONCE, "cpu", 3)
    assert digest_of(module(weight=numbers_NM)) == expected


def test_a_tensor_on_the_meta_device_adds_only_its_name() -> None:
    nothing = torch.ones(3, device="meta")
    assert digest_of(module(weight=nothing)) == digest_of(module(weight=nothing[:1]))
    assert digest_of(module(weight=nothing)) != digest_of(module(other=nothing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_of_which_one_weight_changed_is_refused(dtype: torch.dtype) -> None:
    target = Target(random_llama().to(dtype), byte_tokenizer(), name="tiny", fingerprint="")
    frozen, unused = FrozenTarget(target), cast(Any, None)
    frozen.on_train_end(unused, unused)
    weight = target.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[200, 3] = torch.nextafter(weight[200, 3], weight.new_tensor(9.0))
    with pytest.raises(DrafttrainError, match="must stay frozen"):
        frozen.on_train_end(unused, unused)
