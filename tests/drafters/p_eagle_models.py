"""Tiny P-EAGLE drafters, and a chain of one computed from the published definition alone, one slot after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from drafttrain.target_model import Target
from tests.drafters.eagle_models import eagle_drafter

MASK = 256
SETTINGS: dict[str, Any] = {
    **{"num_layers": 2, "num_depths": 4, "mask_token_id": MASK, "taps": [0, 1, 3]},
    **{"num_heads": 4, "num_kv_heads": 2},
}


def p_eagle(target: Target, *, kind: str = "p_eagle", **settings: Any) -> Any:
    """Return a float64 drafter whose every part matters."""
    drafter = eagle_drafter(kind, target, **SETTINGS | settings)
    with torch.no_grad():
        drafter.mask_hidden.copy_(torch.randn(drafter.mask_hidden.shape, generator=torch.Generator().manual_seed(5)))
    return drafter


def plain_logits(drafter: Any, target: Target, tokens: list[int], row: int, *, shift: int = 1) -> Tensor:
    """Return logits_KR of all depths of a row, by loops over layers, slots and heads with a mask of four conditions.

    Args:
        shift: Places from one mask slot's position to the next; 0 is the wrong variant.
    """
    text = torch.tensor([tokens])
    seen = target.read(text, torch.arange(len(tokens))[None], drafter.needs())
    fused_TD = drafter.fused(drafter.features(seen))[0]
    mask_D = drafter.fused(drafter.mask_hidden)[0, 0]
    slots = [(t, 0) for t in range(row + 1)] + [(row, ahead) for ahead in range(1, drafter.num_depths)]
    hidden = [fused_TD[t] if ahead == 0 else mask_D for t, ahead in slots]
    embedded = [drafter.embed(torch.tensor([[tokens[t + 1] if ahead == 0 else MASK]]))[0, 0] for t, ahead in slots]
    positions = [t + shift * ahead for t, ahead in slots]
    entered = [drafter.entering(e.view(1, 1, -1), h.view(1, 1, -1)) for e, h in zip(embedded, hidden, strict=True)]
    layers = [drafter.midlayer, *drafter.layers.values()]
    for number, layer in enumerate(layers, start=1):
        made = [
            layer.project(inputs, torch.tensor([[position]]))
            for (inputs, _), position in zip(entered, positions, strict=True)
        ]
        stream = []
        for own, ((t, ahead), (query, _, _), (_, residual)) in enumerate(zip(slots, made, entered, strict=True)):
            allowed = [other for other, (j, e) in enumerate(slots) if (e == 0 and j <= t) or (j == t and e <= ahead)]
            assert own in allowed
            keys = torch.cat([made[other][1] for other in allowed], dim=2)
            values = torch.cat([made[other][2] for other in allowed], dim=2)
            shared = query.shape[1] // keys.shape[1]
            heads = []
            for head in range(query.shape[1]):
                scores = keys[0, head // shared] @ query[0, head, 0] / math.sqrt(query.shape[-1])
                heads.append(scores.softmax(0) @ values[0, head // shared])
            stream.append(layer.finish(torch.stack(heads)[None, :, None], residual))
        if number < len(layers):
            entered = [(layers[number].input_layernorm(state), state) for state in stream]
    states_KD = torch.cat(stream[row:])[:, 0]
    return drafter.head(states_KD, 1)
