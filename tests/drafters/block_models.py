"""Tiny block drafters, and a block computed from the published definition alone, with loops over slots, heads and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from drafttrain.target_model import Target
from tests.drafters.eagle_models import eagle_drafter, eagle_target

MASK = 256
SETTINGS: dict[str, Any] = {
    **{"num_layers": 2, "taps": [1, 3], "block_size": 4, "anchors": 3, "mask_token_id": MASK},
    **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
}


def block_target(**settings: Any) -> Target:
    """Return a random float64 target of four layers."""
    return eagle_target(**settings)


def block_drafter(target: Target, kind: str = "dflash", **settings: Any) -> Any:
    """Return a float64 drafter of this kind whose every part matters."""
    return eagle_drafter(kind, target, **SETTINGS | settings)


def normed(states: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the RMS norm of vectors."""
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(head_d: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Return a head's vector rotated to its position: coordinate i is paired with i + d/2."""
    half = len(head_d) // 2
    turned_d = head_d.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(head_d))
        left, right = head_d[i], head_d[i + half]
        turned_d[i] = left * math.cos(angle) - right * math.sin(angle)
        turned_d[i + half] = right * math.cos(angle) + left * math.sin(angle)
    return turned_d


def plain_convolution(
    states_BD: Tensor, base_oD: Tensor, projection: Tensor, normed_BD: Tensor, *, side: int, neighbour: int = -1
) -> Tensor:
    """Return a side of DFlash2's convolution over the slots of a block, channel by channel.

    Args:
        projection: Of [side, tap, group] from a slot's normed input.
        neighbour: Where tap 1 reads; +1 is the wrong variant.
    """
    size, width = states_BD.shape
    taps = len(base_oD)
    groups = len(projection) // (2 * taps)
    found = torch.zeros_like(states_BD)
    for slot in range(size):
        delta = (projection @ normed_BD[slot]).view(2, taps, groups)
        for tap in range(taps):
            read = slot + neighbour * tap
            if not 0 <= read < size:
                continue
            for channel in range(width):
                kernel = base_oD[tap, channel] + delta[side, tap, channel // (width // groups)]
                found[slot, channel] += kernel * states_BD[read, channel]
    return found


def plain_block(
    drafter: Any,
    features_CF: Tensor,
    root: int,
    *,
    block_size: int | None = None,
    norm_context: bool = False,
    neighbour: int = -1,
) -> Tensor:
    """Return states_BD of a block whose root follows these features, after the final norm.

    Args:
        norm_context: The wrong variant: the context passes through the layer's input norm.
        neighbour: Where DFlash2's convolutions read; +1 is the wrong variant.
    """

    def convolved(name: str, states_BD: Tensor, normed_BD: Tensor, side: int) -> Tensor:
        if f"{name}_conv.base_kernel" not in of_layer:
            return states_BD
        base, projection = (of_layer[f"{name}_conv.{part}"] for part in ("base_kernel", "kernel_projection"))
        return plain_convolution(states_BD, base[side], projection, normed_BD, side=side, neighbour=neighbour)

    weights, size = drafter.state_dict(), block_size or drafter.block_size
    eps, width = drafter.config["rms_norm_eps"], drafter.config["head_dim"]
    position = len(features_CF)
    context_CD = normed(features_CF @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    tokens = torch.tensor([root, *[drafter.mask_token_id] * (size - 1)])
    stream_BD = drafter._parts.embed(tokens[None], dtype=torch.float64)[0]
    for number in range(drafter.config["num_hidden_layers"]):
        of_layer = {
            name.removeprefix(f"layers.{number}.").removesuffix(".weight"): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{number}.")
        }
        normed_BD = normed(stream_BD, of_layer["input_layernorm"], eps)
        entering_BD = convolved("attention", normed_BD, normed_BD, 0)
        before_CD = normed(context_CD, of_layer["input_layernorm"], eps) if norm_context else context_CD
        reading_XD = torch.cat([before_CD, entering_BD])
        attended = []
        for slot in range(size):
            heads = []
            for head in range(drafter.config["num_attention_heads"]):
                group = head * drafter.config["num_key_value_heads"] // drafter.config["num_attention_heads"]
                own, theirs = (slice(i * width, (i + 1) * width) for i in (head, group))
                query = normed(of_layer["self_attn.q_proj"][own] @ entering_BD[slot], of_layer["self_attn.q_norm"], eps)
                query = turned(query, position + slot)
                scores, values = [], []
                last = position + (slot if drafter.causal else size - 1)
                for column in range(last + 1):
                    key = of_layer["self_attn.k_proj"][theirs] @ reading_XD[column]
                    key = turned(normed(key, of_layer["self_attn.k_norm"], eps), column)
                    scores.append(query @ key / math.sqrt(width))
                    values.append(of_layer["self_attn.v_proj"][theirs] @ reading_XD[column])
                heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            attended.append(of_layer["self_attn.o_proj"] @ torch.cat(heads))
        stream_BD = stream_BD + convolved("attention", torch.stack(attended), normed_BD, 1)
        normed_BD = normed(stream_BD, of_layer["post_attention_layernorm"], eps)
        inner_BD = convolved("mlp", normed_BD, normed_BD, 0)
        gate, up, down = (of_layer[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
        added_BD = (silu(inner_BD @ gate.T) * (inner_BD @ up.T)) @ down.T
        stream_BD = stream_BD + convolved("mlp", added_BD, normed_BD, 1)
    return normed(stream_BD, weights["norm.weight"], eps)


def plain_logits(drafter: Any, target: Target, tokens: list[int], slot: int, **options: Any) -> Tensor:
    """Return logits_KR of the block at a slot of a text."""
    text = torch.tensor([tokens])
    seen = target.read(text, torch.arange(len(tokens))[None], drafter.needs())
    features_TF = torch.cat([seen.hidden_BTD[tap][0] for tap in drafter.taps], dim=-1)
    states_BD = plain_block(drafter, features_TF[:slot], tokens[slot], **options)
    return drafter.head(drafter.predicting(states_BD[None])[0], 1)
