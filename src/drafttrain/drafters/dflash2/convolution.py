"""The layer of DFlash2: a convolution over the slots of a block around each sublayer, whose kernel depends on the slot.

A = blocks, B = slots of a block, D = hidden, o = taps, g = groups of channels, c = channels of a group
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from drafttrain.drafters.dflash.layer import BlockLayer


class ZeroLinear(nn.Linear):
    """A linear layer without bias that starts from zero. It draws no random number."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Set the weight to zero."""
        nn.init.zeros_(self.weight)


class DynamicConvolution(nn.Module):
    """y_t = sum_o (base_o + delta_{t, o}) * x_{t - o}, once before a sublayer and once after it.

    x before a block's first slot is 0, so no block reads another one. delta is a linear function of the sublayer's normed input,
    and the channels of a group share it. It starts as the identity: base is 1 at o = 0 and 0 elsewhere, delta is 0.

    Source: DFlash 2, as in NeMo Automodel (`GroupedDynamicCausalConv`) and vLLM.
    """

    def __init__(self, *, width: int, taps: int, group_size: int) -> None:
        super().__init__()
        self.groups = width // group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, width))
        nn.init.ones_(self.base_kernel[:, 0])
        self.kernel_projection = ZeroLinear(width, 2 * taps * self.groups)

    def forward(self, normed_ABD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a sublayer adds to the residual stream, between the two convolutions."""
        delta_AB2og = self.kernel_projection(normed_ABD).unflatten(-1, (2, -1, self.groups))
        before_ABog, after_ABog = delta_AB2og.unbind(2)
        entering_ABD = self.convolved(normed_ABD, before_ABog, side=0)
        return self.convolved(sublayer(entering_ABD), after_ABog, side=1)

    def convolved(self, states_ABD: Tensor, delta_ABog: Tensor, *, side: int) -> Tensor:
        """Return y_ABD.

        Args:
            side: 0: before the sublayer; 1: after it.
        """
        states_ABgc = states_ABD.unflatten(-1, (self.groups, -1))
        base_ogc = self.base_kernel[side].unflatten(-1, (self.groups, -1))
        terms = []
        for places, (base_gc, delta_ABg) in enumerate(zip(base_ogc, delta_ABog.unbind(2), strict=True)):
            read_ABgc = states_ABgc[:, : states_ABgc.shape[1] - places]
            # Two products, so that the backward pass stores nothing as large as the states but the states themselves.
            term_ABgc = base_gc * read_ABgc + delta_ABg[:, places:, :, None] * read_ABgc
            terms.append(pad(term_ABgc, (0, 0, 0, 0, places, 0)))
        return cast(Tensor, sum(terms[1:], start=terms[0])).flatten(-2)


class ConvolvedLayer(BlockLayer):
    """The layer of DFlash with a convolution around the attention and around the feed-forward block."""

    def __init__(self, sizes: Any, *, taps: int, group_size: int) -> None:
        super().__init__(sizes)
        self.attention_conv = DynamicConvolution(width=sizes.hidden_size, taps=taps, group_size=group_size)
        self.mlp_conv = DynamicConvolution(width=sizes.hidden_size, taps=taps, group_size=group_size)

    def through(self, name: str, normed_ABD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a sublayer adds, with its convolution around it."""
        added_ABD: Tensor = getattr(self, f"{name}_conv")(normed_ABD, sublayer)
        return added_ABD
