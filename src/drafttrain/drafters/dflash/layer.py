"""The decoder layer of a block drafter: Qwen3's, whose keys and values also come from the target's features.

The same projections make keys and values of the context and of the block. The context enters them as it is, without the layer's
input norm.

A = blocks, B = slots of a block, T = positions of a context, D = hidden, H = heads, G = key-value heads, d = width of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from drafttrain.drafters.eagle.layer import Norm, Projections, SwiGLU, rotated

Turn = tuple[Tensor, Tensor]
"""(cos_ABd, sin_ABd) of the positions of slots."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Returns attended_AHBd of (query_AHBd, key_AGBd, value_AGBd): to the context, and to these keys of the block itself."""


class BlockAttention(Projections):
    """The projections, with a norm of each head of queries and keys."""

    q_norm: Norm
    k_norm: Norm

    def __init__(self, config: Any) -> None:
        super().__init__(config, input_size=config.hidden_size, qk_norm=True)

    def queries(self, inputs_ABD: Tensor, turn: Turn) -> Tensor:
        """Return query_AHBd."""
        return rotated(self.q_norm(self.split(self.q_proj(inputs_ABD))), *turn)

    def keys_and_values(self, inputs_ATD: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Return (key_AGTd, value_AGTd)."""
        key_AGTd = rotated(self.k_norm(self.split(self.k_proj(inputs_ATD))), *turn)
        return key_AGTd, self.split(self.v_proj(inputs_ATD))

    def forward(self, inputs_ABD: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Return what attention adds to the residual stream."""
        attended_AHBd = attend(self.queries(inputs_ABD, turn), *self.keys_and_values(inputs_ABD, turn))
        added_ABD: Tensor = self.o_proj(attended_AHBd.transpose(1, 2).flatten(2))
        return added_ABD


class BlockLayer(nn.Module):
    """Attention and SwiGLU, each after its norm, each added to the residual stream."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(self, stream_ABD: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """Return the residual stream after the layer."""
        stream_ABD = stream_ABD + self.through(
            "attention", self.input_layernorm(stream_ABD), lambda inputs_ABD: self.self_attn(inputs_ABD, turn, attend)
        )
        return stream_ABD + self.through("mlp", self.post_attention_layernorm(stream_ABD), self.mlp)

    def through(self, name: str, normed_ABD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a sublayer adds to the residual stream. A kind may change what enters and leaves it.

        Args:
            name: `attention` or `mlp`.
        """
        return sublayer(normed_ABD)
