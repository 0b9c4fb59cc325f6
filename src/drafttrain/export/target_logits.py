"""What a target adds to the products with its output matrix, as engines read it in the configuration of a drafter that uses that matrix."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from drafttrain.export.layout import text_config
from drafttrain.target_model.logits import CAPPED_AT, finished_logits


def scale_of(target_config: Mapping[str, Any]) -> float:
    """Return what the target multiplies its logits by."""
    fields = {key: value for key, value in text_config(target_config).items() if key not in CAPPED_AT}
    return float(finished_logits(SimpleNamespace(**{"model_type": "", **fields}), torch.ones(())))


def cap_of(target_config: Mapping[str, Any]) -> float | None:
    """Return the soft cap on the target's logits; None: there is none."""
    fields = text_config(target_config)
    return next((fields[key] for key in CAPPED_AT if fields.get(key)), None)
