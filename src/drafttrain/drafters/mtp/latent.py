"""A decoder layer with latent attention (MLA), made of the target's own modules, as a rollout and decoding run it.

Source: DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434, 2.1; transformers' DeepseekV3Attention.

B = sequences, T = positions, H = heads, d = width of a query and of a key, v = width of a value (v <= d), r = rotated part of d,
n = the rest of it, D = hidden, L = width of the latent state
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from drafttrain.core.errors import CheckpointError
from drafttrain.core.flops import Products, RolloutShape, attention, matrix, parameters_of
from drafttrain.drafters.eagle.layer import Norm
from drafttrain.target_model.anatomy import blocks, trunk

ALSO = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
"""The modules of such a layer."""


def has_latent_attention(config: Any) -> bool:
    """Return whether the blocks of a model have latent attention."""
    return getattr(config, "kv_lora_rank", None) is not None


class LatentLayer(nn.Module):
    """Latent attention, then a dense or an expert feed-forward block. Every head has keys of its own.

    Values are padded with zeros to the width of the keys, because attention over packed documents expects equal widths.

    Args:
        model: The target, whose block is built again without its weights.

    Raises:
        CheckpointError: The target's blocks are made of other modules.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = copy.deepcopy(model.config.get_text_config())
        last = blocks(model)[-1]
        if {name for name, _ in last.named_children()} != set(ALSO):
            raise CheckpointError(
                f"drafter.kind mtp: {type(last).__name__} consists of {', '.join(name for name, _ in last.named_children())}: "
                f"a layer with latent attention of {', '.join(ALSO)} is supported"
            )
        made: Any = type(last)(config, len(blocks(model)) - 1)
        self.self_attn, self.mlp = made.self_attn, made.mlp
        self.input_layernorm = made.input_layernorm
        self.post_attention_layernorm = made.post_attention_layernorm
        _use_own_norms(self)
        self.apply(_drawn(config.initializer_range))
        self._rotary = LatentRotary(trunk(model), interleaved=bool(config.rope_interleave))
        width: int = made.self_attn.qk_head_dim
        # The attention divides the scores by the root of the width; a target with YaRN has a factor on that.
        self._factor = made.self_attn.scaling * math.sqrt(width)
        self._active = _active_share(config)

    def queries(self, inputs_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Return query_BHTd."""
        part = self.self_attn
        if part.q_lora_rank is None:
            flat = part.q_proj(inputs_BTD)
        else:
            flat = part.q_b_proj(part.q_a_layernorm(part.q_a_proj(inputs_BTD)))
        query_BHTd = flat.unflatten(-1, (-1, part.qk_head_dim)).transpose(1, 2)
        plain_BHTn, turned_BHTr = query_BHTd.split([part.qk_nope_head_dim, part.qk_rope_head_dim], dim=-1)
        return self._factor * torch.cat([plain_BHTn, self._rotary.rotate(turned_BHTr, positions_BT)], dim=-1)

    def keys_and_values(self, inputs_BTD: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return (key_BHTd, value_BHTd)."""
        part = self.self_attn
        latent_BTL, turned_BTr = part.kv_a_proj_with_mqa(inputs_BTD).split(
            [part.kv_lora_rank, part.qk_rope_head_dim], dim=-1
        )
        both = part.kv_b_proj(part.kv_a_layernorm(latent_BTL))
        both = both.unflatten(-1, (-1, part.qk_nope_head_dim + part.v_head_dim)).transpose(1, 2)
        plain_BHTn, value_BHTv = both.split([part.qk_nope_head_dim, part.v_head_dim], dim=-1)
        turned_B1Tr = self._rotary.rotate(turned_BTr[:, None], positions_BT)
        key_BHTd = torch.cat([plain_BHTn, turned_B1Tr.expand(-1, plain_BHTn.shape[1], -1, -1)], dim=-1)
        return key_BHTd, pad(value_BHTv, (0, part.qk_head_dim - part.v_head_dim))

    def finish(self, attended_BHTd: Tensor, residual_BTD: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        attended_BHTv = attended_BHTd[..., : self.self_attn.v_head_dim]
        stream_BTD = residual_BTD + self.self_attn.o_proj(attended_BHTv.transpose(1, 2).flatten(2))
        return stream_BTD + cast(Tensor, self.mlp(self.post_attention_layernorm(stream_BTD)))

    def products(self, shape: RolloutShape, *, num_keys: int) -> Iterator[Products]:
        """Yield the matrix products of one rollout step and of its gradients.

        Args:
            num_keys: Slots whose keys and values the step computes.
        """
        part = self.self_attn
        of_keys = parameters_of(part.kv_a_proj_with_mqa, part.kv_b_proj)
        yield matrix(of_keys, num_keys, gradients=2)
        yield matrix(parameters_of(self, active=self._active) - of_keys, shape.queries, gradients=2)
        yield attention(self.attention_width, shape.pairs, gradients=2)

    @property
    def attention_width(self) -> int:
        """Width of all query heads."""
        return int(self.self_attn.num_heads * self.self_attn.qk_head_dim)

    def decoding(self) -> DecodingLatentLayer:
        """Return the layer as decoding runs it."""
        return DecodingLatentLayer(self)


class DecodingLatentLayer:
    """A `LatentLayer` in decoding: the same modules. Keys are cached by head, not as latent states."""

    def __init__(self, layer: LatentLayer) -> None:
        self._layer = layer

    def project(self, inputs_BTD: Tensor, positions_BT: Tensor, *, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (query_BHTd, key_BHTd, value_BHTd)."""
        return self._layer.queries(inputs_BTD, positions_BT), *self._layer.keys_and_values(inputs_BTD, positions_BT)

    def finish(self, attended_BHTd: Tensor, residual_BTD: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        return self._layer.finish(attended_BHTd, residual_BTD)


class LatentRotary:
    """Rotary angles of the target. Not a module: casting the drafter's weights must not round the angles.

    Args:
        interleaved: Neighbouring coordinates of a head form a pair; else coordinates i and i + r/2.
    """

    def __init__(self, stack: Any, *, interleaved: bool) -> None:
        self._embedding = stack.rotary_emb
        self._interleaved = interleaved

    def rotate(self, states_BHTr: Tensor, positions_BT: Tensor) -> Tensor:
        """Return states rotated to their positions, with the first coordinates of all pairs before the second ones."""
        cos_BTr, sin_BTr = self._embedding(states_BHTr, positions_BT)
        cos_B1Th, sin_B1Th = (angles.chunk(2, dim=-1)[0][:, None] for angles in (cos_BTr, sin_BTr))
        pairs = (states_BHTr[..., 0::2], states_BHTr[..., 1::2]) if self._interleaved else states_BHTr.chunk(2, dim=-1)
        first, second = pairs
        return torch.cat([first * cos_B1Th - second * sin_B1Th, second * cos_B1Th + first * sin_B1Th], dim=-1)


ATTENTION_FIELDS = (
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("attention_bias",),
)
EXPERT_FIELDS = ("n_routed_experts", "n_shared_experts", "moe_intermediate_size")


def latent_fields(model: Any) -> dict[str, Any]:
    """Return the sizes of the target's last block; those of experts are null if it is dense."""
    config = model.config.get_text_config()
    sparse = hasattr(blocks(model)[-1].mlp, "experts")
    return {name: getattr(config, name) for name in ATTENTION_FIELDS} | {
        name: getattr(config, name) if sparse else None for name in EXPERT_FIELDS
    }


def latent_shapes(fields: Mapping[str, Any], latent: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the layer by name.

    Args:
        fields: The sizes that all layers have.
        latent: What `latent_fields` returned.
    """
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    turned, plain, value = (latent[f"{name}_head_dim"] for name in ("qk_rope", "qk_nope", "v"))
    into, latent_width = latent["q_lora_rank"], latent["kv_lora_rank"]
    queries = heads * (turned + plain)
    matrices = {
        "kv_a_proj_with_mqa": (latent_width + turned, width),
        "kv_b_proj": (heads * (plain + value), latent_width),
        "o_proj": (width, heads * value),
    }
    matrices |= (
        {"q_proj": (queries, width)} if into is None else {"q_a_proj": (into, width), "q_b_proj": (queries, into)}
    )
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in matrices.items()}
    norms = {"kv_a": latent_width} | ({} if into is None else {"q_a": into})
    shapes |= {f"self_attn.{name}_layernorm.weight": (size,) for name, size in norms.items()}
    if latent["attention_bias"]:
        biased = [name for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if name in matrices]
        shapes |= {f"self_attn.{name}.bias": matrices[name][:1] for name in biased}
    shapes |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes | _feed_forward_shapes(fields, latent)


def _feed_forward_shapes(fields: Mapping[str, Any], latent: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, experts, small = fields["hidden_size"], latent["n_routed_experts"], latent["moe_intermediate_size"]
    prefix, inner = ("mlp.", fields["intermediate_size"])
    shapes: dict[str, tuple[int, ...]] = {}
    if experts is not None:
        prefix, inner = "mlp.shared_experts.", small * latent["n_shared_experts"]
        shapes = {
            "mlp.gate.weight": (experts, width),
            "mlp.gate.e_score_correction_bias": (experts,),
            "mlp.experts.gate_up_proj": (experts, 2 * small, width),
            "mlp.experts.down_proj": (experts, width, small),
        }
    outer = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    return shapes | {f"{prefix}{name}.weight": shape for name, shape in outer.items()}


def _use_own_norms(module: nn.Module) -> None:
    """Replace every RMS norm by `Norm`, which computes in float32 or wider."""
    for name, child in list(module.named_children()):
        if "norm" in name:
            norm = cast(Any, child)
            setattr(module, name, Norm(norm.weight.shape[0], eps=norm.variance_epsilon))
        else:
            _use_own_norms(child)


def _drawn(deviation: float) -> Any:
    def draw(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=deviation)

    return draw


def _active_share(config: Any) -> float:
    """Return the share of the experts that a token passes through."""
    experts = getattr(config, "n_routed_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0
