"""Checks the types of the fields that are read from an EAGLE drafter's config.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from drafttrain.core.printable import shown
from drafttrain.drafters.drafter import DRAFTS

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


def config_problems(config: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return one line for every field with a wrong type.

    Args:
        own: Defaults of the kind's own fields, which the section `drafttrain` must contain.
    """
    sizes = [*SIZES, *(key for key in ("max_position_embeddings", "draft_vocab_size") if config.get(key) is not None)]
    found = [
        f"{key} must be a whole number of 1 or more, got {shown(config.get(key))}"
        for key in sizes
        if type(config.get(key)) is not int or config[key] < 1
    ]
    found += [
        f"{key} must be a number above 0, got {shown(config.get(key))}"
        for key in ("rms_norm_eps",)
        if not _positive(config.get(key))
    ]
    rope = config.get("rope_parameters", {})
    if not isinstance(rope, Mapping):
        found.append(f"rope_parameters must be a mapping, got {shown(rope)}")
    elif not isinstance(rope.get("rope_type", "default"), str) or not _positive(rope.get("rope_theta", 1.0)):
        found.append(
            f"rope_parameters must hold a name and a number above 0 as rope_type and rope_theta, got {shown(dict(rope))}"
        )
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping | None):
        found.append(f"rope_scaling must be a mapping, got {shown(scaling)}")
    taps = config.get("eagle_aux_hidden_state_layer_ids")
    taps = [] if taps is None else taps
    if not isinstance(taps, list) or any(type(tap) is not int for tap in taps):
        found.append(f"eagle_aux_hidden_state_layer_ids must be a list of whole numbers, got {shown(taps)}")
    return [f"config.json: {line}" for line in [*found, *_own_problems(config.get("drafttrain"), own)]]


def _own_problems(given: Any, own: Mapping[str, Any]) -> list[str]:
    if not isinstance(given, Mapping):
        return [f"drafttrain must be a mapping, got {shown(given)}"]
    found = []
    for key, default in own.items():
        value = given.get(key)
        if key not in given:
            found.append(f"drafttrain.{key} is missing")
        elif key == "draft" and value not in DRAFTS:
            found.append(f"drafttrain.draft must be {' or '.join(DRAFTS)}, got {shown(value)}")
        elif isinstance(default, float) and not _finite(value):
            found.append(f"drafttrain.{key} must be a number, got {shown(value)}")
        elif type(default) is int and (type(value) is not int or not 1 <= value <= 4096):
            found.append(f"drafttrain.{key} must be a whole number of 1..4096, got {shown(value)}")
        elif isinstance(default, str) and not isinstance(value, str):
            found.append(f"drafttrain.{key} must be a name, got {shown(value)}")
    return found


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _positive(value: Any) -> bool:
    return _finite(value) and value > 0
