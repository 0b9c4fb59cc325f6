"""The growing cache has the contents of one that is concatenated at every step, with few copies."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

from drafttrain.core.texts import Sampling
from drafttrain.data_gen.backends import Task
from drafttrain.data_gen.backends.builtin import continuations
from drafttrain.target_model import Target
from drafttrain.target_model.cached_lm import CachedLM
from drafttrain.target_model.growing_layer import COLUMNS_AT_ONCE, GrowingLayer
from tests.conftest import byte_tokenizer, random_llama


def states(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2, columns, 4), torch.randn(3, 2, columns, 4)


def test_a_growing_layer_equals_a_concatenated_one() -> None:
    growing, joined = GrowingLayer(), DynamicLayer()
    for columns in (5, 1, 70, 1, 200, 1):
        new = states(columns)
        for ours, theirs in zip(growing.update(*new), joined.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        # Roll back by one, and overwrite the dropped column.
        growing.show(growing.keys.shape[2] - 1)
        joined.crop(-1)
    assert growing.get_seq_length() == joined.get_seq_length()


def test_a_growing_layer_copies_rarely_and_wastes_little_memory() -> None:
    layer = GrowingLayer()
    layer.update(*states(300))
    places, most_empty = set(), 0
    for _ in range(500):
        layer.update(*states(1))
        room = layer._taken[0].shape[2]
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
        most_empty = max(most_empty, room - layer.keys.shape[2] - layer.keys.shape[2] // 8)
    assert len(places) <= 500 / COLUMNS_AT_ONCE
    assert most_empty < COLUMNS_AT_ONCE


def test_unwritten_columns_cannot_turn_a_softmax_into_nan() -> None:
    """They are masked, but 0 times NaN is NaN."""
    layer = GrowingLayer()
    layer.update(*states(3))
    assert not layer._taken[0][:, :, 3:].any()
    assert not layer._taken[1][:, :, 3:].any()


def test_sequences_and_columns_are_selected_in_one_copy() -> None:
    layer = GrowingLayer()
    keys, values = states(6)
    layer.update(keys, values)
    layer.select(torch.tensor([2, 0]), torch.tensor([[0, 2, 3], [1, 4, 5]]))
    for ours, whole in ((layer.keys, keys), (layer.values, values)):
        assert torch.equal(ours, torch.stack([whole[2][:, [0, 2, 3]], whole[0][:, [1, 4, 5]]]))


class Calls(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def calls_of(num_texts: int, *, new: int, temperature: float) -> dict[str, int]:
    model = random_llama(num_layers=1, hidden_size=16)
    model.generation_config.eos_token_id = None
    target = Target(model, byte_tokenizer(), name="t", fingerprint="")
    tasks = [Task(str(i), list(range(1, 3 + i)), Sampling(temperature)) for i in range(num_texts)]
    with Calls() as calls:
        continuations(tasks, target, max_new_tokens=new, seed=0)
    return calls.counts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_of_generation_reads_the_device_once_whatever_the_batch(temperature: float) -> None:
    """The calls do not grow with the texts; one more token does not copy the cache."""
    few, many = (calls_of(count, new=8, temperature=temperature) for count in (2, 12))
    longer = calls_of(12, new=9, temperature=temperature)
    for name, count in many.items():
        assert name == "rand" or count - few[name] < 8, f"{name} grows with the texts and the steps"
    # The model joins the halves of its rotary states, twice a layer and once a call.
    assert longer["cat"] - many["cat"] <= 4


def test_a_kept_cache_is_no_larger_than_its_text() -> None:
    """After rounds with few accepted tokens, the used columns are those of the longest text."""
    lm = CachedLM(random_llama(num_layers=1, hidden_size=16), name="t")
    lm.begin([[1, 2, 3], [4]])
    for _ in range(30):
        lm.forward([[5, 6, 7, 8], [5, 6]])
        lm.keep([[0], [0]])
    (layer,) = lm.cache.hf.layers
    assert layer.keys.shape[2] == lm.cache.columns == max(lm.lengths) == 33
    assert layer._taken[0].shape[2] == COLUMNS_AT_ONCE
