"""The matrix products of a causal LM on a batch, for counting FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from drafttrain.core.flops import BatchShape, Products, attention, matrix, parameters_of
from drafttrain.target_model.anatomy import blocks


def trunk_products(
    model: Any, shape: BatchShape, *, gradients: int, num_blocks: int | None = None
) -> Iterator[Products]:
    """Yield the products of all blocks, or of the first `num_blocks`.

    Every block is counted as attending to all earlier tokens. Of experts, only those that a token is routed to count.
    """
    config = model.config.get_text_config()
    width = query_width(config)
    for block in blocks(model)[:num_blocks]:
        yield matrix(parameters_of(block, active=active_experts(config)), shape.positions, gradients=gradients)
        yield attention(width, shape.pairs, gradients=gradients)


def head_parameters(model: Any) -> int:
    """Return the parameters of the head, which is used once per requested row."""
    return parameters_of(model.get_output_embeddings())


def query_width(config: Any) -> int:
    """Return the width of all query heads of a layer."""
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def active_experts(config: Any) -> float:
    """Return the share of a block's experts to which one token is routed."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((int(count) for name in names if (count := getattr(config, name, None))), 0)
    sent_to = getattr(config, "num_experts_per_tok", None)
    return int(sent_to) / experts if experts and sent_to else 1.0
