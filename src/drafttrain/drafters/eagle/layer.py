"""The one decoder layer of an EAGLE drafter: a Llama layer whose projections may read more than the residual stream.

B = sequences, T = positions (N = those of one call), C = keys (columns), H = heads, G = key-value heads,
d = width of a head, D = hidden, X = input width of the projections, Y = output width of a projection
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, silu

from drafttrain.core.flops import Products, RolloutShape, attention, matrix, parameters_of
from drafttrain.drafters.decoding_layer import DecodingAttention, DecodingSwiGLU, TurnTable


class EagleLayer(nn.Module):
    """Rotary attention with grouped keys, then a SwiGLU block.

    The norms before the projections differ between the kinds of drafters, so they are not here.

    Args:
        qkv_bias: Queries, keys and values have a bias, as in Qwen2.
        qk_norm: Queries and keys are normed by head, as in Qwen3.
    """

    def __init__(self, config: Any, *, input_size: int, qkv_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.self_attn = Projections(config, input_size=input_size, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self._rotary = Rotary(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @property
    def rotary(self) -> Rotary:
        """The angles of positions."""
        return self._rotary

    def project(self, inputs_BTX: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (query_BHTd, key_BGTd, value_BGTd), rotated to their positions."""
        return self.queries(inputs_BTX, positions_BT), *self.keys_and_values(inputs_BTX, positions_BT)

    def queries(self, inputs_BTX: Tensor, positions_BT: Tensor) -> Tensor:
        """Return query_BHTd."""
        query_BHTd = self.self_attn.split(self.self_attn.q_proj(inputs_BTX))
        if self.self_attn.q_norm is not None:
            query_BHTd = self.self_attn.q_norm(query_BHTd)
        return self._rotary.rotate(query_BHTd, positions_BT)

    def keys_and_values(self, inputs_BTX: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return (key_BGTd, value_BGTd)."""
        key, value = (
            self.self_attn.split(linear(inputs_BTX)) for linear in (self.self_attn.k_proj, self.self_attn.v_proj)
        )
        if self.self_attn.k_norm is not None:
            key = self.self_attn.k_norm(key)
        return self._rotary.rotate(key, positions_BT), value

    def products(self, shape: RolloutShape, *, num_keys: int) -> Iterator[Products]:
        """Yield the matrix products of one rollout step and of its gradients.

        Args:
            num_keys: Slots whose keys and values the step computes.
        """
        of_keys = parameters_of(self.self_attn.k_proj, self.self_attn.v_proj)
        yield matrix(of_keys, num_keys, gradients=2)
        yield matrix(parameters_of(self) - of_keys, shape.queries, gradients=2)
        yield attention(self.attention_width, shape.pairs, gradients=2)

    @property
    def attention_width(self) -> int:
        """Width of all query heads."""
        return self.self_attn.q_proj.out_features

    def finish(self, attended_BHTd: Tensor, residual_BTD: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        stream_BTD = residual_BTD + self.self_attn.o_proj(attended_BHTd.transpose(1, 2).flatten(2))
        return stream_BTD + self.mlp(self.post_attention_layernorm(stream_BTD))

    def decoding(self) -> DecodingEagleLayer:
        """Return the layer as decoding runs it, with its weights prepared once."""
        return DecodingEagleLayer(self)


class DecodingEagleLayer:
    """An `EagleLayer` on plain tensors: later changes of the layer do not reach it."""

    def __init__(self, layer: EagleLayer) -> None:
        self._attention = DecodingAttention(layer.self_attn, head_dim=layer.self_attn.head_dim)
        self._norm, self._mlp = layer.post_attention_layernorm, DecodingSwiGLU(layer.mlp)
        self._turns = TurnTable(layer.rotary, fixed=layer.rotary.is_fixed)

    def project(self, inputs_BNX: Tensor, positions_BN: Tensor, *, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (query_BHNd, key_BGNd, value_BGNd), rotated to their positions.

        Args:
            last: The largest position.
        """
        return self._attention.project(inputs_BNX, self._turns.at(positions_BN, last=last, like=inputs_BNX))

    def finish(self, attended_BHNd: Tensor, residual_BND: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        stream_BND = residual_BND + self._attention.output(attended_BHNd)
        return stream_BND + self._mlp(self._norm(stream_BND))


class Projections(nn.Module):
    """Query, key, value and output projections."""

    def __init__(self, config: Any, *, input_size: int, qkv_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.head_dim: int = config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, queries, bias=qkv_bias)
        self.k_proj = nn.Linear(input_size, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(input_size, keys, bias=qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = Norm(self.head_dim, eps=config.rms_norm_eps) if qk_norm else None
        self.k_norm = Norm(self.head_dim, eps=config.rms_norm_eps) if qk_norm else None

    def split(self, projected_BTY: Tensor) -> Tensor:
        """Return heads_BHTd."""
        return projected_BTY.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SwiGLU(nn.Module):
    """The feed-forward block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states_BTD: Tensor) -> Tensor:
        """Return down(silu(gate) * up)."""
        down: Tensor = self.down_proj(silu(self.gate_proj(states_BTD)) * self.up_proj(states_BTD))
        return down


class Norm(nn.RMSNorm):
    """RMS norm that returns the type of its input, computed in float32 or wider; its backward pass needs only the input.

    Under autocast CUDA's norms return float32 and store a float32 copy, and each projection after them casts and stores
    another copy.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Return normed states of the same type."""
        weight_D = self.weight.to(states.dtype)
        with torch.autocast(states.device.type, enabled=False):
            if states.is_cuda or not torch.is_grad_enabled():
                return rms_norm(states, self.normalized_shape, weight_D, self.eps)
            normed: Tensor = _Normed.apply(states, weight_D, self.eps)
        return normed


class _Normed(torch.autograd.Function):
    """Like PyTorch's CUDA kernel. Elsewhere PyTorch has no fused kernel, and stores five tensors."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = _wide(states)
        factor = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(states, factor, weight_D)
        return (wide * factor).mul_(weight_D).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        states, factor, weight_D = ctx.saved_tensors
        normed, wide = _wide(states) * factor, _wide(gradient)
        in_weight_D = (wide * normed).flatten(0, -2).sum(dim=0)
        in_normed = wide * weight_D
        drift = (in_normed * normed).mean(dim=-1, keepdim=True)
        in_states = in_normed.sub_(normed.mul_(drift)).mul_(factor)
        return in_states.to(states.dtype), in_weight_D.to(weight_D.dtype), None


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


class Rotary:
    """Rotary angles with the configured scaling. Not a module: casting the weights must not round the angles."""

    def __init__(self, config: Any) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self._embedding = LlamaRotaryEmbedding(config=config)

    @property
    def frequencies(self) -> Tensor:
        """Angle per position of every pair of coordinates."""
        frequencies: Tensor = self._embedding.inv_freq
        return frequencies

    @property
    def is_fixed(self) -> bool:
        """Whether the angle of a position is the same in every call; `dynamic` scaling depends on the longest text."""
        return self._embedding.rope_type != "dynamic"

    def __call__(self, positions_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos_BTd, sin_BTd) in the type of `like`."""
        cos_BTd, sin_BTd = self._embedding.to(like.device)(like, positions_BT)
        return cos_BTd, sin_BTd

    def rotate(self, states_BHTd: Tensor, positions_BT: Tensor) -> Tensor:
        """Return states rotated to their positions."""
        return rotated(states_BHTd, *self(positions_BT, states_BHTd))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type in which products with this weight are computed: autocast's if it is on, else the weight's."""
    return (
        torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else weight.dtype
    )


def rotated(states_BHTd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Return states rotated by the angles of their positions; the two halves of a head are the two coordinates."""
    left, right = states_BHTd.chunk(2, dim=-1)
    quarter_turn_BHTd = torch.cat([-right, left], dim=-1)
    return states_BHTd * cos_BTd[:, None] + quarter_turn_BHTd * sin_BTd[:, None]
