"""Hidden states of packed rows, in which documents must not attend to each other.

Without a mask and a cache, most models separate documents by positions that restart at 0. A model that does not (it has no
positions, or adds its own bias for distance) reads each document in a row of its own.

B = sequences, T = positions, L = documents, S = tokens of the longest document, D = hidden
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drafttrain.core.batches import PackedDocuments
from drafttrain.core.images import PlacedImages
from drafttrain.core.linear_head import no_autocast_if_frozen
from drafttrain.core.target_rows import TargetNeeds
from drafttrain.target_model.anatomy import taps, trunk
from drafttrain.target_model.logits import assume_compared, check_logits
from drafttrain.target_model.packed_forward import NotPlain, may_be_read_packed, packed, through_every_block
from drafttrain.target_model.vision import Vision

PROBE_TOKENS = 4
"""Tokens of each document in a probe."""

_separated: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_packed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_masked: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def document_states(
    model: Any,
    tokens_BT: Tensor,
    positions_BT: Tensor,
    *,
    hidden: tuple[int, ...] = (),
    documents: PackedDocuments | None = None,
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Return (final_BTD, the requested residual streams by index) of packed rows.

    Args:
        positions_BT: They restart at 0 with each document; padding is a document too.
        documents: Where the documents are, if known. Finding them makes the host wait for a GPU.

    Raises:
        CheckpointError: Logits computed from these states differ from the model's own (`check_logits`).
    """
    with no_autocast_if_frozen(model.get_output_embeddings().weight):
        probe(model)
        if separates_documents(model):
            with (
                taps(model, TargetNeeds(hidden=hidden)) as seen,
                _attention(model, positions_BT, documents) as by_kernel,
            ):
                mask_B1TT = None if by_kernel else _mask(model, positions_BT, documents)
                final_BTD = _final(model, tokens_BT, positions_BT, mask_B1TT)
            return final_BTD, {int(index): state for index, state in seen.items()}
        with taps(model, TargetNeeds(hidden=hidden)) as seen:
            final_LSD = _final(model, as_read(model, tokens_BT, positions_BT), None)
        states = [final_LSD, *seen.values()]
        places = _own_rows(positions_BT)
        final_BTD, *others = (state[places].unflatten(0, tokens_BT.shape) for state in states)
        return final_BTD, dict(zip(map(int, seen), others, strict=True))


def seen_states(
    model: Any,
    vision: Vision,
    tokens_BT: Tensor,
    positions_BT: Tensor,
    *,
    hidden: tuple[int, ...] = (),
    images: Sequence[PlacedImages],
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Return what `document_states` returns, of rows in which some documents have images.

    The multimodal model reads each document in a row of its own: positions and attention depend on its images.

    Args:
        vision: Of the same model.
    """
    check_logits(model)
    document_R, column_R = _own_rows(positions_BT)
    texts = [text_S.tolist() for text_S in tokens_BT.flatten().split(document_R.bincount().tolist())]
    numbers_BT = document_R.view_as(positions_BT)
    by_document = {int(numbers_BT[one.row, one.column]): one.images for one in images}
    own = [by_document.get(number, ()) for number in range(len(texts))]
    with no_autocast_if_frozen(model.get_output_embeddings().weight), taps(model, TargetNeeds(hidden=hidden)) as seen:
        arguments = vision.arguments(texts, own, device=tokens_BT.device)
        final_LSD = vision.trunk(**arguments, use_cache=False).last_hidden_state
    states = [final_LSD, *seen.values()]
    final_BTD, *others = (state[document_R, column_R].unflatten(0, tokens_BT.shape) for state in states)
    return final_BTD, dict(zip(map(int, seen), others, strict=True))


def probe(model: Any) -> None:
    """Find out once per model, by short forwards in a fixed order, how it reads packed rows.

    Processes that share sharded weights must run the model equally often, so whether a probe runs must not depend on the
    rows of one process.

    Raises:
        CheckpointError: Logits computed from its final states differ from the model's own (`check_logits`).
    """
    check_logits(model)
    separates_documents(model)
    reads_packed(model)
    takes_mask(model)


def assume_plain(model: Any) -> None:
    """Assume what a probe finds of common models, for one whose weights have no data: nothing can be compared."""
    assume_compared(model)
    _separated[model] = _masked[model] = True
    _packed[model] = False


def as_read(model: Any, values_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Return values of tokens in the layout in which `document_states` gives the tokens to this model; 0 at padding."""
    if separates_documents(model):
        return values_BT
    document_R, column_R = _own_rows(positions_BT)
    values_LS = values_BT.new_zeros(int(document_R.max()) + 1, int(column_R.max()) + 1)
    values_LS[document_R, column_R] = values_BT.flatten()
    return values_LS


def _own_rows(positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and column of every token if each document gets a row of its own."""
    return (positions_BT == 0).flatten().cumsum(0) - 1, positions_BT.flatten()


def separates_documents(model: Any) -> bool:
    """Return whether restarting positions separate this model's documents. Probed once per model, on two short ones."""
    if model not in _separated:
        _separated[model] = _takes_positions(model) and _probe_positions(model)
    return _separated[model]


def reads_packed(model: Any) -> bool:
    """Return whether flash attention can read this model's documents one by one. Probed once per model."""
    if model not in _packed:
        _packed[model] = may_be_read_packed(model) and separates_documents(model) and _probe_kernel(model)
    return _packed[model]


@contextmanager
def _attention(model: Any, positions_BT: Tensor, documents: PackedDocuments | None) -> Iterator[bool]:
    """Within this context the model's attention reads the documents by the kernel, if it can; yield whether it does."""
    # With gradients, recomputed activations would run outside the context.
    if torch.is_grad_enabled() or not reads_packed(model):
        yield False
        return
    with packed(model, documents or PackedDocuments.of(positions_BT)):
        yield True


def _mask(model: Any, positions_BT: Tensor, documents: PackedDocuments | None) -> Tensor | None:
    """Return the mask that transformers would make from these positions; None: leave it to transformers.

    Transformers waits for the device to find out whether a row has several documents. Here the host knows.
    """
    known = documents is not None and documents.on_host is not None and len(documents.on_host) > len(positions_BT)
    return _same_document_before(positions_BT) if known and takes_mask(model) else None


def _same_document_before(positions_BT: Tensor) -> Tensor:
    number_BT = (positions_BT == 0).cumsum(dim=1)
    return (number_BT[:, None, :, None] == number_BT[:, None, None, :]).tril()


def takes_mask(model: Any) -> bool:
    """Return whether this model accepts a full mask instead of the one it makes from positions. Probed once per model."""
    if model not in _masked:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        everywhere = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
        plain = model.config._attn_implementation == "sdpa"
        _masked[model] = everywhere and plain and separates_documents(model) and _probe_mask(model)
    return _masked[model]


@torch.no_grad()
def _probe_mask(model: Any) -> bool:
    try:
        states_2SD = _second_documents(model, masked=True)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # Models raise different errors for a mask of the wrong form. An error that has another cause, such as a lost device
        # or process, also occurs without a mask: this forward raises it.
        _second_documents(model)
        return False
    return _close(states_2SD, _second_documents(model))


@torch.no_grad()
def _probe_kernel(model: Any) -> bool:
    plain_2SD = _second_documents(model)
    documents = PackedDocuments.of(torch.arange(PROBE_TOKENS, device=plain_2SD.device).repeat(2, 2))
    try:
        with packed(model, documents) as calls:
            states_2SD = _second_documents(model)
    except NotPlain:
        return False
    return through_every_block(model, calls) and _close(*states_2SD) and _close(states_2SD, plain_2SD, tolerance=0.05)


@torch.no_grad()
def _probe_positions(model: Any) -> bool:
    return _close(*_second_documents(model))


def _second_documents(model: Any, *, masked: bool = False) -> Tensor:
    """Return the states of the second document in two rows that differ only in their first document.

    Args:
        masked: Separate the documents by a mask that is made here.
    """
    # Under ZeRO-3 the embedding has no rows outside a forward.
    size = int(model.config.get_text_config().vocab_size)
    device = model.get_input_embeddings().weight.device
    tokens_2T = torch.tensor([[*range(1, 5), *range(5, 9)], [*range(11, 15), *range(5, 9)]], device=device) % size
    positions_2T = torch.arange(PROBE_TOKENS, device=device).repeat(2, 2)
    was_training = model.training
    model.eval()
    mask_21TT = _same_document_before(positions_2T) if masked else None
    try:
        return _final(model, tokens_2T, positions_2T, mask_21TT)[:, PROBE_TOKENS:].float()
    finally:
        model.train(was_training)


def _close(one: Tensor, other: Tensor, *, tolerance: float = 1e-4) -> bool:
    return float((one - other).norm()) <= tolerance * float(one.norm())


def _final(model: Any, tokens_BT: Tensor, positions_BT: Tensor | None, mask_B1TT: Tensor | None = None) -> Tensor:
    """Return the state after the final norm.

    Without a cache, and with a full mask or none: otherwise transformers attends across documents.
    """
    positions = {} if positions_BT is None else {"position_ids": positions_BT}
    states_BTD: Tensor = trunk(model)(
        input_ids=tokens_BT, attention_mask=mask_B1TT, use_cache=False, **positions
    ).last_hidden_state
    return states_BTD


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
