"""The target's scale and soft cap of logits, which engines read from the configuration of a drafter that uses the target's head."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from drafttrain.export.layout import text_config
from drafttrain.target_model.logits import CAPPED_AT, finished_logits


def scale_of(target_config: Mapping[str, Any]) -> float:
    """Return the factor by which the target scales its logits."""
    fields = {key: value for key, value in text_config(target_config).items() if key not in CAPPED_AT}
    return float(finished_logits(SimpleNamespace(**{"model_type": "", **fields}), torch.ones(())))


def cap_of(target_config: Mapping[str, Any]) -> float | None:
    """Return the soft cap on the target's logits; None: it has none."""
    fields = text_config(target_config)
    return next((fields[key] for key in CAPPED_AT if fields.get(key)), None)
