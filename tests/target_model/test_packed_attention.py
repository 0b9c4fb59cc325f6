"""Attention of packed rows equals one softmax over columns and own keys, for every kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.batches import PackedDocuments, ReadSlots
from drafttrain.target_model import packed_attention, packed_kernels
from drafttrain.target_model.packed_attention import Columns
from drafttrain.target_model.packed_kernels import FlashOnCPU, FlashOnCUDA, Pieces
from tests.target_model.flash_numbers import flash_numbers

KERNELS = [FlashOnCPU, FlashOnCUDA, Pieces]
HEADS, GROUPS, WIDTH = 6, 2, 8
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 17 + [2] + [-1] * 10, [3] * 37, [4] * 20 + [5] * 17])
"""Several documents a row, one of a single token, one that fills its row, and padding: 37 slots a row."""


@pytest.fixture(scope="module", autouse=True)
def _numbers() -> Iterator[None]:
    with flash_numbers():
        yield


@pytest.fixture(params=KERNELS)
def kernel(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(packed_attention, "kernel_for", lambda query: request.param)
    monkeypatch.setattr(packed_kernels, "PIECE_SLOTS", 5)
    return request.param


def states(num_own: int, dtype: torch.dtype, *, documents: Tensor = DOCUMENTS) -> list[Tensor]:
    """Return random (query, keys, values, own key, own value, ...)."""
    generator = torch.Generator().manual_seed(0)
    heads = [HEADS, *[GROUPS] * (2 + 2 * num_own)]
    made = [torch.randn(*documents.shape, n, WIDTH, generator=generator, dtype=torch.float64) for n in heads]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


def dense(documents: Tensor, query: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
    """Return attended_BHTd from one softmax over the scores of all columns and own keys."""
    keys, values, *own = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (keys, values, *own))  # type: ignore[assignment]
    length = documents.shape[1]
    allowed = (documents[:, :, None] == documents[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    scores = [(query @ keys.mT).masked_fill(~allowed[:, None], -torch.inf)]
    scores += [(query * key).sum(dim=-1, keepdim=True) for key in own[::2]]
    weights = (torch.cat(scores, dim=-1) / math.sqrt(WIDTH)).softmax(dim=-1)
    parts = [weights[..., :length] @ values]
    parts += [weights[..., length + i, None] * value for i, value in enumerate(own[1::2])]
    return torch.stack(parts).sum(dim=0)


def positions_of(documents: Tensor) -> Tensor:
    """Return positions that restart where the document's number changes."""
    positions = torch.zeros_like(documents)
    for column in range(1, documents.shape[1]):
        same = documents[:, column] == documents[:, column - 1]
        positions[:, column] = torch.where(same, positions[:, column - 1] + 1, 0)
    return positions


def apart(documents: Tensor) -> PackedDocuments:
    """Return where the documents are, from rows of document numbers."""
    return PackedDocuments.of(positions_of(documents))


def ours(documents: Tensor, query: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
    return Columns(keys, values, apart(documents)).attend(query, list(zip(own[::2], own[1::2], strict=True)))


def with_gradients(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradient of every input under a random gradient of the output."""
    attended = attend(DOCUMENTS, *inputs)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(attended.shape, generator=generator, dtype=torch.float64).to(attended.dtype)
    return [attended, *torch.autograd.grad(attended, inputs, gradient)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_queries_at_the_last_columns_have_the_outputs_and_gradients_of_all_queries(kernel, dtype):
    """Slots 3..7 of the first document, the single token, one slot of a full row, none of padding or the last ones."""
    trained = torch.tensor([3, 7, 9 + 17, 37 + 30])
    slots = ReadSlots.of(trained, positions_of(DOCUMENTS))
    read = torch.tensor([*range(3, 8), 26, 67])
    inputs = states(1, dtype)

    def narrowed(_: Tensor, query: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        columns = [slots.columns(x.transpose(1, 2)) for x in (query, keys, values, *own)]
        query, *own = (slots.queries(x).transpose(1, 2) for x in (columns[0], *columns[3:]))  # type: ignore[assignment]
        found = Columns(columns[1].transpose(1, 2), columns[2].transpose(1, 2), slots.documents).attend(
            query, [tuple(own)]
        )
        return found[0].transpose(0, 1)

    def whole(documents: Tensor, *given: Tensor) -> Tensor:
        return dense(documents, *given).transpose(1, 2).flatten(0, 1)[read]

    atol = 1e-12 if dtype is torch.float64 else 1e-5
    wanted = with_gradients(whole, states(1, torch.float64))
    for ours_, theirs in zip(with_gradients(narrowed, inputs), wanted, strict=True):
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=atol)


def test_a_given_scale_is_used(kernel):
    query, *rest = states(1, torch.float64)
    columns = Columns(rest[0], rest[1], apart(DOCUMENTS))
    found = with_gradients(
        lambda _, q, *r: columns.attend(q, [(r[2], r[3])], scale=3 / math.sqrt(WIDTH)), [query, *rest]
    )
    wanted = with_gradients(lambda d, q, *r: dense(d, 3 * q, *r), [query, *rest])
    for ours_, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_own", [0, 1, 3])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_outputs_and_gradients_equal_those_of_one_plain_softmax(kernel, num_own, dtype, atol):
    wanted = with_gradients(dense, states(num_own, torch.float64))
    found = with_gradients(ours, states(num_own, dtype))
    for name, ours_, theirs in zip(("attended", "query", "keys", "values", *"kvkvkv"), found, wanted, strict=False):
        assert ours_.dtype == dtype
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=atol, msg=name)


def test_the_kernels_agree_in_16_bits_up_to_rounding(kernel):
    wanted = with_gradients(dense, states(2, torch.float64))
    for found, theirs in zip(with_gradients(ours, states(2, torch.bfloat16)), wanted, strict=True):
        assert found.dtype is torch.bfloat16
        assert (found.double() - theirs).norm() < 0.02 * theirs.norm()


def test_autocast_changes_nothing(kernel):
    plain = with_gradients(ours, states(2, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(ours, states(2, torch.float32))
    for found, theirs in zip(cast, plain, strict=True):
        assert torch.equal(found, theirs)


def test_control_the_normalizer_of_the_columns_alone_gives_other_gradients(kernel, monkeypatch):
    backward = kernel.backward

    def of_columns(gradient, query, keys, values, attended, normalizer, documents, scale):  # type: ignore[no-untyped-def]
        attended, normalizer = kernel.forward(query, keys, values, documents, scale)
        return backward(gradient, query, keys, values, attended, normalizer, documents, scale)

    monkeypatch.setattr(kernel, "backward", staticmethod(of_columns))
    _, _, *found = with_gradients(ours, states(1, torch.float64))
    _, _, *wanted = with_gradients(dense, states(1, torch.float64))
    keys, values, own_key, own_value = (bool((a - b).abs().max() < 1e-6) for a, b in zip(found, wanted, strict=True))
    assert (keys, values, own_key, own_value) == (False, False, True, True)


def test_control_documents_that_attend_to_each_other_give_other_outputs(kernel):
    inputs = states(1, torch.float64)
    own, joined = ours(DOCUMENTS, *inputs), ours(torch.zeros_like(DOCUMENTS), *inputs)
    same = (own - joined).abs().amax(dim=(1, 3)) < 1e-9
    first = torch.cat([torch.arange(37)[None] < n for n in (9, 37, 20)])
    assert torch.equal(same, first)


def test_memory_for_the_backward_pass_is_linear_in_the_slots(kernel):
    def kept(length: int) -> int:
        documents = torch.zeros(1, length, dtype=torch.long)
        inputs = states(2, torch.float32, documents=documents)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attended = ours(documents, *inputs)
        attended.sum().backward()
        return sum(sizes.values())

    assert kept(128) == 2 * kept(64)


def test_documents_of_any_order_and_length_are_found():
    for lengths in itertools.product((1, 2, 5), repeat=3):
        row = torch.repeat_interleave(torch.tensor([7, 3, 9]), torch.tensor(lengths))
        documents = torch.stack([row, row.flip(0)])
        found = apart(documents)
        pieces = [documents.flatten()[own].unique().tolist() for own, _ in found.slices]
        assert pieces == [[7], [3], [9], [9], [3], [7]]
        assert found.bounds.tolist()[-1] == documents.numel()
