"""The floating-point operations that training needs, computed from shapes: two for each multiply-add of a matrix product.
Norms, activations, softmax and recomputation are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

EARLY = 64
"""Labels are counted by position up to here; no rollout is longer."""


@dataclass(frozen=True)
class BatchShape:
    """How much of a micro-batch there is to compute, without padding."""

    positions: int
    """Tokens that are read."""
    pairs: int
    """Pairs of a token and one that it attends to: n (n + 1) / 2 in a document of n tokens."""
    labels: int
    """Tokens that are trained labels."""
    early_labels: tuple[int, ...] = ()
    """Of these, how many are token 0, 1, 2 ... of their document."""
    spans: tuple[tuple[int, int], ...] = ()
    """The first and the last trained label of each document, of those that have two tokens before them."""

    def rows(self, shift: int) -> int:
        """Return how many trained labels have a token `shift` places before them in their document."""
        return self.labels - sum(self.early_labels[:shift])

    def rollout(self, num_steps: int) -> RolloutShape:
        """Return what a rollout with lag 1 computes for these labels (`core.batches.ReadSlots`)."""
        # The last computed state is two before the last label; the first one is where the deepest step predicts the first label.
        ends = [(max(0, first - num_steps - 1), last - 1) for first, last in self.spans]
        # Without labels one slot is computed, so that all processes take the same step.
        ends = ends or [(0, 1)]
        return RolloutShape(
            columns=sum(end for _, end in ends),
            queries=sum(end - start for start, end in ends),
            pairs=sum((end * (end + 1) - start * (start + 1)) // 2 for start, end in ends),
        )

    def blocks(self, per_document: int) -> BlocksShape:
        """Return what blocks at random roots compute, with lag 0: the expected numbers, if all labels between first and last count.

        Args:
            per_document: Roots drawn in a document, without replacement, among the tokens before its labels.
        """
        drawn = [(first, last, min(per_document, last - first + 1)) for first, last in self.spans]
        return BlocksShape(
            roots=sum(count for *_, count in drawn) or 1,
            pairs=round(sum(count * ((first + last) / 2 - 1) for first, last, count in drawn)),
            drawn=tuple((last - first + 1, count) for first, last, count in drawn),
        )


@dataclass(frozen=True)
class BlocksShape:
    """How much of a micro-batch blocks at chosen roots compute."""

    roots: int
    """Roots of all documents."""
    pairs: int
    """Pairs of a root and a token before it in its document."""
    drawn: tuple[tuple[int, int], ...]
    """By document, its labels and its roots."""

    def rows(self, depth: int) -> int:
        """Return the expected number of roots that have this many labels after them."""
        return round(sum(count * max(0, labels - depth + 1) / labels for labels, count in self.drawn))


@dataclass(frozen=True)
class RolloutShape:
    """How much of a micro-batch a rollout computes."""

    columns: int
    """Columns: slots that are attended to."""
    queries: int
    """Queries, at every step."""
    pairs: int
    """Pairs of a query and a column that it attends to."""


@dataclass(frozen=True)
class Products:
    """Matrix products of one kind: the multiplications of the forward pass, and as many again for each gradient."""

    multiplications: int
    gradients: int
    """0: none; 1: of the weights or of their input; 2: of both."""
    of_weights: bool = True
    """One side is a weight: if it is frozen, it needs no gradient."""

    @property
    def flops(self) -> int:
        """Floating-point operations forward and backward."""
        return 2 * self.multiplications * (1 + self.gradients)


def matrix(parameters: int, rows: int, *, gradients: int) -> Products:
    """Return the products of multiplying rows by a matrix."""
    return Products(parameters * rows, gradients)


def attention(width: int, pairs: int, *, gradients: int) -> Products:
    """Return the products of attention scores and weighted sums; `width` is that of all query heads together."""
    return Products(2 * width * pairs, gradients, of_weights=False)


def total(products: Iterable[Products]) -> int:
    """Return the operations of all products."""
    return sum(each.flops for each in products)


def parameters_of(*modules: nn.Module | None, active: float = 1.0) -> int:
    """Return the parameters of all matrices that rows are multiplied by, in these modules: no embeddings, norms or biases.

    Args:
        active: Share of a stack of experts' matrices that one row is multiplied by.
    """
    from torch import nn

    count = 0.0
    parts = [part for module in modules if module is not None for part in module.modules()]
    for part in parts:
        if isinstance(part, nn.Linear):
            # Also right if the weight is packed or partitioned over processes.
            count += part.in_features * part.out_features
        elif not isinstance(part, nn.Embedding):
            shapes = [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in part.parameters(recurse=False)]
            count += sum(prod(shape) * (active if len(shape) == 3 else 1) for shape in shapes if len(shape) > 1)
    return round(count)
