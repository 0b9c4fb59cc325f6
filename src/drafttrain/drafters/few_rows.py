"""Matrix products with few rows, as decoding has them, from weights that are prepared once.

X = inputs, Y = outputs of all weights together
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from drafttrain.target_model.logits import finished_logits, head_logits

Product = Callable[[Tensor], Tensor]


def product_with(linears: Sequence[nn.Module]) -> Product:
    """Return a function that multiplies inputs_..X by the weights of all these linear layers at once, into outputs_..Y.

    The weights are copied if there are several, or if they are packed: later changes of a layer do not reach the function.
    On a CPU in bfloat16 they are packed in the order that oneDNN's kernel reads. `linear` would do that again in every
    call, which costs as much as the product itself.
    """
    weights = [_parameter(layer, "weight") for layer in linears]
    biases = [_parameter(layer, "bias") for layer in linears if getattr(layer, "bias", None) is not None]
    assert not biases or len(biases) == len(weights)
    weight_YX = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias_Y = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    if _can_pack(weight_YX):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_YX, 1)
        return lambda inputs: torch.ops.mkldnn._linear_pointwise(inputs, packed, bias_Y, "none", [], "")
    return lambda inputs: linear(inputs, weight_YX, bias_Y)


def head_product(model: Any, rows: nn.Linear | None = None) -> Product:
    """Return the target's `head_logits` as a function of states_ND, with packed weights where that helps.

    Args:
        rows: Some rows of the head, whose logits alone are computed.
    """
    head = model.get_output_embeddings() if rows is None else rows
    if rows is None and (type(head) is not nn.Linear or not _can_pack(head.weight)):
        return partial(head_logits, model)
    product, config, weight = product_with([head]), model.config.get_text_config(), head.weight

    def logits(states_ND: Tensor) -> Tensor:
        logits_NR = product(states_ND.to(weight.device, weight.dtype)).to(states_ND.device)
        return finished_logits(config, logits_NR)

    return logits


def _parameter(layer: nn.Module, name: str) -> Tensor:
    parameter = getattr(layer, name)
    assert isinstance(parameter, Tensor)
    return parameter.detach()


def _can_pack(weight_YX: Tensor) -> bool:
    return (
        weight_YX.device.type == "cpu"
        and weight_YX.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
