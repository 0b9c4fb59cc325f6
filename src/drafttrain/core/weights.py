"""Sizes of weights in memory, and what it costs to pass rows through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drafttrain.core.flops import attention, matrix, parameters_of
from drafttrain.core.generations import Work

if TYPE_CHECKING:
    from torch import nn


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all parameters of the modules."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


@dataclass(frozen=True)
class Weights:
    """The weights of a part of a model."""

    num_bytes: int = 0
    multiplications: int = 0
    """Of one row that passes through them."""
    attention_width: int = 0
    """Width of all query heads, added up over layers."""

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.num_bytes + other.num_bytes,
            self.multiplications + other.multiplications,
            self.attention_width + other.attention_width,
        )

    def __sub__(self, other: Weights) -> Weights:
        return Weights(
            self.num_bytes - other.num_bytes,
            self.multiplications - other.multiplications,
            self.attention_width - other.attention_width,
        )

    def read(self, rows: int, *, pairs: int = 0) -> Work:
        """Return the work of passing rows through them in one call.

        Args:
            pairs: Pairs of a row and a token that it attends to, in each layer.
        """
        return Work(
            weight_bytes=self.num_bytes,
            product_flops=matrix(self.multiplications, rows, gradients=0).flops,
            attention_flops=attention(self.attention_width, pairs, gradients=0).flops,
        )


def weights_of(*modules: nn.Module | None, attention_width: int = 0, active: float = 1.0) -> Weights:
    """Return the weights of modules.

    Args:
        active: Share of a stack of experts' matrices that one row is multiplied by. All of them count as read.
    """
    present = [module for module in modules if module is not None]
    return Weights(weight_bytes(*present), parameters_of(*present, active=active), attention_width)
