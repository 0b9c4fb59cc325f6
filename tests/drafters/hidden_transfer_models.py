"""Tiny Hidden Transfer drafters whose maps matter."""

from __future__ import annotations

from typing import Any

import torch

from drafttrain.drafters.hidden_transfer.module import HiddenTransferDrafter
from drafttrain.drafters.hidden_transfer.settings import HiddenTransferSettings
from drafttrain.target_model import Target


def transfer(target: Target, **settings: Any) -> Any:
    """Return a drafter in the target's type with random maps."""
    given: dict[str, Any] = {"layers": [1, 2, 2]} | settings
    made = HiddenTransferSettings(num_steps=len(given["layers"]), **given)
    drafter = HiddenTransferDrafter.create(made, target=target, tokenizer=None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return drafter.eval()
