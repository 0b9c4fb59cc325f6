"""Records of token ids: `tokens` with a mask, or `input_ids` and `labels` as trainers use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.record_keys import MASKS

NO_LABEL = -100
"""Value in `labels` at tokens that are not trained."""


def token_row(form: str, value: Mapping[str, Any], *, num_ids: int) -> tuple[list[int], list[bool]]:
    """Return the ids of a row and its mask; padding (attention_mask 0) is left out.

    Raises:
        BadItem: Ids, labels or masks have the wrong type or length, or labels are not the ids.
    """
    tokens = _ids(value[form], form)
    if outside := [token for token in tokens if not 0 <= token < num_ids]:
        raise BadItem(f"{form}: {outside[0]} is not an id of the tokenizer (0..{num_ids - 1})")
    mask_T = [True] * len(tokens)
    for name in [name for name in MASKS if name in value]:
        mask_T = [one and other for one, other in zip(mask_T, _flags(value[name], name, len(tokens)), strict=True)]
    if "labels" in value:
        labels = _ids(value["labels"], "labels")
        if len(labels) != len(tokens):
            raise BadItem(f"labels: {len(labels)} labels for {len(tokens)} {form}")
        if any(label not in (NO_LABEL, token) for label, token in zip(labels, tokens, strict=True)):
            raise BadItem(f"labels: each must be the id at its own place in {form}, or {NO_LABEL}; are they shifted?")
        mask_T = [one and label != NO_LABEL for one, label in zip(mask_T, labels, strict=True)]
    if "attention_mask" not in value:
        return tokens, mask_T
    read_T = _flags(value["attention_mask"], "attention_mask", len(tokens))
    return [one for one, is_read in zip(tokens, read_T, strict=True) if is_read], [
        one for one, is_read in zip(mask_T, read_T, strict=True) if is_read
    ]


def _ids(value: Any, key: str) -> list[int]:
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise BadItem(f"{key}: must be a list of integers")
    return value


def _flags(value: Any, key: str, length: int) -> list[bool]:
    if not isinstance(value, list) or len(value) != length:
        raise BadItem(f"{key}: must be a list of {length} flags (0, 1, true, false)")
    if any(not isinstance(one, bool | int | float) or one not in (0, 1) for one in value):
        raise BadItem(f"{key}: must hold flags (0, 1, true, false)")
    return [bool(one) for one in value]
