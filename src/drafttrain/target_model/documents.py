"""States of packed rows, in which documents must not see each other.

Most models tell documents apart by positions that restart, when there is neither a mask nor a cache. One that does not (it has
no positions, or adds its own bias for distance) reads each document in a row of its own.

B = sequences, T = positions, L = documents, S = tokens of the longest document, D = hidden
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drafttrain.core.autocast import in_own_precision
from drafttrain.core.batches import PackedDocuments
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.target_model.anatomy import taps, trunk
from drafttrain.target_model.logits import check_logits
from drafttrain.target_model.packed_reading import NotPlain, may_be_read_packed, packed, through_every_block

TRIED = 4
"""Tokens of each document that is tried."""

_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_packed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_masked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@in_own_precision
def document_states(
    model: Any,
    tokens_BT: Tensor,
    positions_BT: Tensor,
    *,
    hidden: tuple[int, ...] = (),
    documents: PackedDocuments | None = None,
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Return (final_BTD, the residual streams asked for by index) of packed rows.

    Args:
        positions_BT: Restart at 0 with each document, padding being one too.
        documents: Where these lie, if the caller knows: looking for them makes the host wait for a GPU.

    Raises:
        CheckpointError: What is made of these states is not what the model makes of them (`check_logits`).
    """
    probe(model)
    if tells_documents_apart(model):
        with taps(model, TargetNeeds(hidden=hidden)) as seen, _attention(model, positions_BT, documents) as by_kernel:
            mask_B1TT = None if by_kernel else _mask(model, positions_BT, documents)
            final_BTD = _final(model, tokens_BT, positions_BT, mask_B1TT)
        return final_BTD, {int(index): state for index, state in seen.items()}
    with taps(model, TargetNeeds(hidden=hidden)) as seen:
        final_LSD = _final(model, as_read(model, tokens_BT, positions_BT), None)
    states = [final_LSD, *seen.values()]
    places = _own_rows(positions_BT)
    final_BTD, *others = (state[places].unflatten(0, tokens_BT.shape) for state in states)
    return final_BTD, dict(zip(map(int, seen), others, strict=True))


def probe(model: Any) -> None:
    """Find out all that reading packed rows asks of a model, once a model, by short forwards in one order.

    Processes among which the weights are spread must run a model equally often: whether something is tried must not depend on the
    rows of one of them.

    Raises:
        CheckpointError: What is made of its final states is not what the model makes of them (`check_logits`).
    """
    check_logits(model)
    tells_documents_apart(model)
    reads_packed(model)
    takes_mask(model)


def as_read(model: Any, values_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Return values of the tokens of packed rows as `document_states` lays the tokens out for this model; 0 where there is none."""
    if tells_documents_apart(model):
        return values_BT
    document_R, column_R = _own_rows(positions_BT)
    values_LS = values_BT.new_zeros(int(document_R.max()) + 1, int(column_R.max()) + 1)
    values_LS[document_R, column_R] = values_BT.flatten()
    return values_LS


def _own_rows(positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and column of every token when each document has a row of its own: positions restart with each."""
    return (positions_BT == 0).flatten().cumsum(0) - 1, positions_BT.flatten()


def tells_documents_apart(model: Any) -> bool:
    """Tell whether positions that restart keep this model's documents apart; tried once a model, on two short ones."""
    if model not in _apart:
        _apart[model] = _takes_positions(model) and _try(model)
    return _apart[model]


def reads_packed(model: Any) -> bool:
    """Return whether flash attention reads this model's documents one by one; tried once a model."""
    if model not in _packed:
        _packed[model] = may_be_read_packed(model) and tells_documents_apart(model) and _try_packed(model)
    return _packed[model]


@contextmanager
def _attention(model: Any, positions_BT: Tensor, documents: PackedDocuments | None) -> Iterator[bool]:
    """Yield whether the model's attention reads these documents by a kernel inside the block."""
    # With gradients, what a checkpoint computes again would run outside of the context.
    if torch.is_grad_enabled() or not reads_packed(model):
        yield False
        return
    with packed(model, documents or PackedDocuments.of(positions_BT)):
        yield True


def _mask(model: Any, positions_BT: Tensor, documents: PackedDocuments | None) -> Tensor | None:
    """Return the mask that transformers would make of these positions; None: it is to make one.

    To find out whether a row holds several documents it waits for the device; here the host knows.
    """
    known = documents is not None and documents.on_host is not None and len(documents.on_host) > len(positions_BT)
    return _same_document_before(positions_BT) if known and takes_mask(model) else None


def _same_document_before(positions_BT: Tensor) -> Tensor:
    number_BT = (positions_BT == 0).cumsum(dim=1)
    return (number_BT[:, None, :, None] == number_BT[:, None, None, :]).tril()


def takes_mask(model: Any) -> bool:
    """Return whether this model takes a whole mask in place of the one that it makes of positions; tried once a model."""
    if model not in _masked:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        everywhere = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
        plain = model.config._attn_implementation == "sdpa"
        _masked[model] = everywhere and plain and tells_documents_apart(model) and _try_mask(model)
    return _masked[model]


@torch.no_grad()
def _try_mask(model: Any) -> bool:
    try:
        states_2SD = _second_documents(model, masked=True)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # What a model raises that wants a mask of another form differs by model. What fails without a mask too, as a device or
        # another process that is gone, is raised by this forward.
        _second_documents(model)
        return False
    return _alike(states_2SD, _second_documents(model))


@torch.no_grad()
def _try_packed(model: Any) -> bool:
    plain_2SD = _second_documents(model)
    documents = PackedDocuments.of(torch.arange(TRIED, device=plain_2SD.device).repeat(2, 2))
    try:
        with packed(model, documents) as calls:
            states_2SD = _second_documents(model)
    except NotPlain:
        return False
    return through_every_block(model, calls) and _alike(*states_2SD) and _alike(states_2SD, plain_2SD, up_to=0.05)


@torch.no_grad()
def _try(model: Any) -> bool:
    return _alike(*_second_documents(model))


def _second_documents(model: Any, *, masked: bool = False) -> Tensor:
    """Return the states of the second document of two rows, of which only the first document differs.

    Args:
        masked: By a mask that is made here.
    """
    # ZeRO-3 leaves no rows of the embedding here outside of a forward.
    size = int(model.config.get_text_config().vocab_size)
    device = model.get_input_embeddings().weight.device
    tokens_2T = torch.tensor([[*range(1, 5), *range(5, 9)], [*range(11, 15), *range(5, 9)]], device=device) % size
    positions_2T = torch.arange(TRIED, device=device).repeat(2, 2)
    was_training = model.training
    model.eval()
    mask_21TT = _same_document_before(positions_2T) if masked else None
    try:
        return _final(model, tokens_2T, positions_2T, mask_21TT)[:, TRIED:].float()
    finally:
        model.train(was_training)


def _alike(one: Tensor, other: Tensor, *, up_to: float = 1e-4) -> bool:
    return float((one - other).norm()) <= up_to * float(one.norm())


def _final(model: Any, tokens_BT: Tensor, positions_BT: Tensor | None, mask_B1TT: Tensor | None = None) -> Tensor:
    """Return the state after the final norm.

    No cache, and no mask but a whole one: with either, transformers attends across documents.
    """
    positions = {} if positions_BT is None else {"position_ids": positions_BT}
    states_BTD: Tensor = trunk(model)(
        input_ids=tokens_BT, attention_mask=mask_B1TT, use_cache=False, **positions
    ).last_hidden_state
    return states_BTD


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
