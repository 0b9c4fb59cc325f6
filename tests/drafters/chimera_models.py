"""Tiny Chimera drafters, and the logits after one slot computed from the definition alone, one token after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from drafttrain.target_model import Target
from tests.drafters.eagle_models import eagle_drafter

SETTINGS: dict[str, Any] = {"num_steps": 3, "num_heads": 4, "num_kv_heads": 2}


def chimera(target: Target, **settings: Any) -> Any:
    """Return a float64 drafter whose every part matters."""
    return eagle_drafter("chimera", target, **SETTINGS | settings)


def plain_logits(drafter: Any, target: Target, tokens: list[int], slot: int, *, shift: int = 1) -> Tensor:
    """Return logits_KR of all depths after a slot, with a list as the cache.

    Args:
        shift: Places from one newer token to the next; 0 is the wrong variant.
    """
    text = torch.tensor([tokens])
    seen = target.read(text, torch.arange(len(tokens))[None], drafter.needs())
    known_TD, layer = drafter.features(seen)[0], drafter.layer
    cache = []
    for t in range(slot + 1):
        key, value = layer.keys_and_values(layer.input_layernorm(known_TD[None, t : t + 1]), torch.tensor([[t]]))
        cache.append((key[0, :, 0], value[0, :, 0]))
    found = []
    for step in range(1, drafter.num_steps + 1):
        place = slot + step
        three = torch.cat(
            [drafter.embed(torch.tensor([[tokens[max(0, p)]]]))[0, 0] for p in range(place - 2, place + 1)]
        )
        block = drafter.blocks.layers[0]
        newer_D = drafter.fc(three + torch.nn.functional.silu(block(three)))
        position = torch.tensor([[slot + 1 + shift * (step - 1)]])
        query, key, value = layer.project(layer.input_layernorm(newer_D)[None, None], position)
        cache.append((key[0, :, 0], value[0, :, 0]))
        groups, heads = query.shape[1] // key.shape[1], []
        for head in range(query.shape[1]):
            scores = torch.stack([query[0, head, 0] @ k[head // groups] for k, _ in cache]) / math.sqrt(query.shape[-1])
            heads.append(scores.softmax(0) @ torch.stack([v[head // groups] for _, v in cache]))
        state_D = layer.finish(torch.stack(heads)[None, :, None], newer_D[None, None])[0, 0]
        number = 0 if len(drafter.lm_heads) == 1 else step - 1
        found.append(drafter.lm_heads[number](torch.cat([state_D, known_TD[slot]])))
    return torch.stack(found)
