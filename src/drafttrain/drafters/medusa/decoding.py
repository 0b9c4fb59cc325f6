"""Medusa's heads as decoding runs them: the blocks of all heads in one batched product a layer, weights prepared once.

K = heads, M = sequences that draft, D = hidden, W = width of a head's output
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from drafttrain.drafters.few_rows import product_with
from drafttrain.drafters.medusa.blocks import ResidualBlocks


class DecodingHeads:
    """The heads, in the order of their depth. Later changes of the blocks do not reach it.

    The blocks' weights are stored a second time. Output matrices are not (in bfloat16 on a CPU they are, packed): they are by
    far the largest part, so each has its own product. A shared one multiplies the states of all heads at once.

    Args:
        blocks: The residual blocks of each head.
        lm_heads: The output matrix of each head, or one for all.
        after: Elementwise scale or soft cap of the logits.
    """

    def __init__(
        self,
        blocks: Sequence[ResidualBlocks],
        lm_heads: Sequence[nn.Module],
        *,
        after: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._blocks = [
            (
                torch.stack([linear.weight.detach().T for linear in layer]),
                torch.stack([linear.bias.detach()[None] for linear in layer]),
            )
            for layer in zip(*(block.layers for block in blocks), strict=True)
        ]
        self._outputs = [product_with([head]) for head in lm_heads]
        self._after = after

    def __call__(self, final_MD: Tensor, num_heads: int) -> list[Tensor]:
        """Return logits_MW of the first heads, from the target's states."""
        states_KMD = final_MD.expand(num_heads, -1, -1)
        for weight_KDD, bias_K1D in self._blocks:
            weight_KDD, bias_K1D = weight_KDD[:num_heads], bias_K1D[:num_heads]
            states_KMD = states_KMD.to(weight_KDD.dtype)
            states_KMD = states_KMD + silu(torch.baddbmm(bias_K1D, states_KMD, weight_KDD))
        if len(self._outputs) == 1:
            logits = list(self._outputs[0](states_KMD))
        else:
            logits = [output(states_MD) for output, states_MD in zip(self._outputs, states_KMD, strict=False)]
        return logits if self._after is None else [self._after(logits_MW) for logits_MW in logits]
