"""Kangaroo's adapter: one attention block and a norm.

B = sequences, T = positions, D = hidden, H = heads, d = width of a head
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.drafters.recomputing import run_part

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps (query_BHTd, keys_BHTd, values_BHTd) to attended_BHTd; it knows which positions a query may attend to."""


class Adapter(nn.Module):
    """One attention block without a feed-forward part, and a norm after it: 4 D^2 weights and two norms.

    Args:
        last_norm: The target's final norm; `norm` starts as a copy of it.
        draft_vocab_size: Tokens that can be drafted, whose ids `token_map` holds; None: all.
    """

    def __init__(
        self,
        last_norm: nn.Module,
        width: int,
        *,
        num_heads: int,
        rope_theta: float,
        draft_vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        if width % (2 * num_heads):
            raise CheckpointError(
                f"drafter.num_heads: {num_heads} heads of even size do not divide the target's width {width}"
            )
        self.width = width
        self.num_heads = num_heads
        self.rope_theta = rope_theta
        self.layers = nn.ModuleList([AttentionBlock(width, num_heads=num_heads, rope_theta=rope_theta)])
        self.norm = _trainable_copy(last_norm)
        self.token_map: Tensor | None
        self.register_buffer("token_map", None if draft_vocab_size is None else torch.arange(draft_vocab_size))

    @property
    def blocks(self) -> list[AttentionBlock]:
        """The attention blocks: one. `layers` is the name in the paper's code."""
        return cast("list[AttentionBlock]", list(self.layers))

    def forward(self, exit_BTD: Tensor, positions_BT: Tensor, attend: Attend, *, recompute: bool = False) -> Tensor:
        """Return the states that the target's head reads.

        Args:
            exit_BTD: States that enter the exit layer.
        """
        states_BTD = exit_BTD.to(next(self.parameters()).dtype)
        for layer in self.blocks:
            through = partial(layer.through, positions_BT=positions_BT, attend=attend)
            states_BTD = run_part(through, states_BTD, recompute=recompute)
        normed_BTD: Tensor = self.norm(states_BTD)
        return normed_BTD


class AttentionBlock(nn.Module):
    """f + attention(norm(f)), as the two functions before and after the attention."""

    def __init__(self, width: int, *, num_heads: int, rope_theta: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.self_attn = Projections(width, num_heads=num_heads, rope_theta=rope_theta)

    def project(self, states_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (query_BHTd, keys_BHTd, values_BHTd)."""
        return self.self_attn.project(self.input_layernorm(states_BTD), positions_BT)

    def through(self, states_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """Return the states after the block."""
        return self.finish(attend(*self.project(states_BTD, positions_BT)), states_BTD)

    def finish(self, attended_BHTd: Tensor, states_BTD: Tensor) -> Tensor:
        """Return the states plus the output of the attention."""
        added_BTD: Tensor = self.self_attn.o_proj(attended_BHTd.transpose(1, 2).flatten(2))
        return states_BTD + added_BTD


class Projections(nn.Module):
    """Projections of causal attention with rotary positions. The output projection starts at zero."""

    def __init__(self, width: int, *, num_heads: int, rope_theta: float) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)
        nn.init.zeros_(self.o_proj.weight)

    def project(self, normed_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (query_BHTd, keys_BHTd, values_BHTd), the first two rotated to their positions."""
        query_BHTd, key_BHTd, value_BHTd = (
            projection(normed_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query_BHTd, key_BHTd = (rotated(x, positions_BT, theta=self.rope_theta) for x in (query_BHTd, key_BHTd))
        return query_BHTd, key_BHTd, value_BHTd


def rotated(x_BHTd: Tensor, positions_BT: Tensor, *, theta: float) -> Tensor:
    """Return queries or keys rotated to their positions: dimension i is paired with i + d/2."""
    half = x_BHTd.shape[-1] // 2
    speed_d = theta ** -(torch.arange(half, device=x_BHTd.device, dtype=torch.float64) / half)
    angle_BTd = positions_BT.to(x_BHTd.device)[..., None] * speed_d
    cos_B1Td, sin_B1Td = angle_BTd.cos()[:, None].to(x_BHTd.dtype), angle_BTd.sin()[:, None].to(x_BHTd.dtype)
    first, second = x_BHTd[..., :half], x_BHTd[..., half:]
    return torch.cat([first * cos_B1Td - second * sin_B1Td, second * cos_B1Td + first * sin_B1Td], dim=-1)


def _trainable_copy(norm: nn.Module) -> nn.Module:
    """Return a copy of the norm with trainable weights of float32 or wider."""
    own = {
        id(weight): nn.Parameter(weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True))
        for weight in norm.parameters()
    }
    # deepcopy takes these weights from its memo instead of copying them.
    return copy.deepcopy(norm, own)
