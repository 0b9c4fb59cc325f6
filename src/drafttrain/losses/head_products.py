"""The products of a drafter's head with the rows of a part, and the gradients that go back through them.

n = rows of a part, P = these with padding, V = vocabulary, D = hidden, r = columns of the added product
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from drafttrain.core.few_sizes import in_few_sizes
from drafttrain.core.linear_head import LinearHead

ADDS_IN_FLOAT32 = torch.__version__ >= "2.11"
"""From this version on, CUDA can add a product of half types to a float32 matrix in place."""


class Inputs:
    """The tensors that gradients are computed for, by name, and their gradients so far."""

    def __init__(self, named: Mapping[Hashable, Tensor]) -> None:
        self.tensors = list(named.values())
        self.needed: Sequence[bool] = ()
        self.gradients: list[Tensor | None] = [None] * len(named)
        self._place = {name: number for number, name in enumerate(named)}

    def needs(self, name: Hashable) -> bool:
        """Return whether the gradient of this tensor is wanted."""
        return self.needed[self._place[name]]

    def gradient(self, name: Hashable) -> Tensor:
        """Return the gradient of a tensor, accumulated so far."""
        number = self._place[name]
        known = self.gradients[number]
        if known is None:
            known = self.gradients[number] = torch.zeros_like(self.tensors[number])
        return known

    def complete(self) -> None:
        """Give zeros to the tensors without a gradient: ZeRO reduces gradients by position, the same on all ranks."""
        for number, (given, needed) in enumerate(zip(self.tensors, self.needed, strict=True)):
            if needed and self.gradients[number] is None:
                self.gradients[number] = torch.zeros_like(given)


@dataclass(frozen=True)
class Entering:
    """What enters the matrix for some rows of a depth, and the states that it is computed from."""

    depth: int
    index_n: Tensor
    """The rows among the states of the depth."""
    states_nD: Tensor
    entering_nD: Tensor


@dataclass(frozen=True)
class Made:
    """Products of some rows, without gradient."""

    entering: Entering
    multiplied_PD: Tensor
    added_Pr: Tensor | None
    """The columns of the states that the added matrix multiplies."""
    products_nV: Tensor
    """Before the head's scale or cap; without one, with the added product."""


@dataclass(frozen=True)
class Leaves:
    """What the values of some rows are differentiated in."""

    products_nV: Tensor
    logits_nV: Tensor
    """A function of the products; the same tensor without a scale or cap."""
    confidence_n: Tensor | None

    def gradients(self, total: Tensor, *, again: bool = False) -> Gradients:
        """Return the gradient of a number; of products and logits the same tensor, where these are the same.

        Args:
            again: Another number of these rows follows.
        """
        same = self.logits_nV is self.products_nV
        others = [] if same else [self.logits_nV]
        wanted = [self.products_nV, *others, *([] if self.confidence_n is None else [self.confidence_n])]
        found = torch.autograd.grad(total, wanted, retain_graph=again, allow_unused=True)
        of_logits = found[0] if same else found[1]
        return Gradients(found[0], of_logits, None if self.confidence_n is None else found[-1])


@dataclass(frozen=True)
class Gradients:
    """Gradients of outputs of the head; None: 0."""

    products_nV: Tensor | None
    logits_nV: Tensor | None
    confidence_n: Tensor | None


class JoinedGradients:
    """The gradients of the rows of a part, from those of its bands.

    Args:
        in_place: The products are not needed any more: their gradient takes their place.
    """

    def __init__(self, made: Made, *, in_place: bool) -> None:
        self._count = len(made.products_nV)
        self._parts: dict[str, Tensor] = {}
        self._room = {"products_nV": made.products_nV} if in_place else {}

    def add(self, rows: slice, found: Gradients) -> None:
        """Add the gradients of a band."""
        for name, gradient in vars(found).items():
            if gradient is None:
                continue
            if name == "logits_nV" and gradient is found.products_nV:
                self._parts[name] = self._parts["products_nV"]
                continue
            if len(gradient) == self._count:
                self._parts[name] = gradient
                continue
            if name not in self._parts:
                room = self._room.get(name)
                self._parts[name] = gradient.new_empty(self._count, *gradient.shape[1:]) if room is None else room
            self._parts[name][rows] = gradient

    def whole(self) -> Gradients:
        """Return the gradients of all rows."""
        return Gradients(*(self._parts.get(name) for name in ("products_nV", "logits_nV", "confidence_n")))


@dataclass(frozen=True)
class RowGradients:
    """Gradients of inputs of the head; None: 0."""

    entering_nD: Tensor | None
    added_nr: Tensor | None
    confidence_n: Tensor | None

    def times(self, factor_n: Tensor) -> RowGradients:
        """Return the gradients of a sum over rows with these factors."""
        return RowGradients(
            _times(self.entering_nD, factor_n[:, None]),
            _times(self.added_nr, factor_n[:, None]),
            _times(self.confidence_n, factor_n),
        )

    def plus(self, other: RowGradients) -> RowGradients:
        """Return the gradients of a sum."""
        return RowGradients(
            _plus(self.entering_nD, other.entering_nD),
            _plus(self.added_nr, other.added_nr),
            _plus(self.confidence_n, other.confidence_n),
        )


class HeadProducts:
    """The head of one term.

    Args:
        inputs: Of the term: `states, depth`, `confidence, depth`, and each weight of the head by its `id`.
        vocab_size: Logits are cut to these ids.
    """

    def __init__(self, head: LinearHead, inputs: Inputs, *, vocab_size: int) -> None:
        self.head = head
        self.inputs = inputs
        self.vocab_size = vocab_size
        self._cast: dict[int, Tensor] = {}

    def is_frozen(self, depth: int) -> bool:
        """Return whether no matrix of a depth is trained. The layers before it may be."""
        return not any(self.inputs.needs(id(weight)) for weight in self.head.matrices(depth))

    def made(self, states_RD: Tensor, depth: int, index_n: Tensor) -> Made:
        """Return the products of some rows of the states."""
        states_nD, added_nr = self.head.split(states_RD.detach().index_select(0, index_n))
        entering_nD = states_nD
        if self.head.before is not None:
            with torch.enable_grad():
                entering_nD = self.head.entering(states_nD.requires_grad_())
        layer = self.head.linear(depth)
        matrix_VD = self._matrix(layer.weight)
        multiplied_PD = in_few_sizes(entering_nD.detach().to(matrix_VD.dtype))
        bias_V = None if layer.bias is None else layer.bias.detach()[: len(matrix_VD)].to(matrix_VD.dtype)
        with torch.autocast(states_RD.device.type, enabled=False):
            products_nV = linear(multiplied_PD, matrix_VD, bias_V)[: len(index_n)]
        added_Pr = None
        if self.head.added is not None and added_nr is not None:
            added_Pr = in_few_sizes(added_nr.to(self._matrix(self.head.added.weight).dtype))
            if self.head.after is None:
                products_nV = products_nV + self._added(added_Pr, len(index_n))
        return Made(Entering(depth, index_n, states_nD, entering_nD), multiplied_PD, added_Pr, products_nV)

    def leaves(self, made: Made, rows: slice, confidence_n: Tensor | None) -> Leaves:
        """Return the logits of a band, as a function of leaves where gradients are enabled."""
        products_nV = made.products_nV[rows].detach().requires_grad_(torch.is_grad_enabled())
        logits_nV = products_nV
        if self.head.after is not None:
            logits_nV = self.head.after(products_nV)
            if made.added_Pr is not None:
                logits_nV = logits_nV + self._added(made.added_Pr[rows], len(products_nV))
        if confidence_n is not None:
            confidence_n = confidence_n.detach().requires_grad_(torch.is_grad_enabled())
        return Leaves(products_nV, logits_nV, confidence_n)

    def pull(self, made: Made, gradients: Gradients) -> None:
        """Add to the gradients of weights and states."""
        layer = self.head.linear(made.entering.depth)
        if gradients.products_nV is not None:
            self._pull_matrix(layer.weight, gradients.products_nV, made.multiplied_PD)
            if layer.bias is not None and self.inputs.needs(id(layer.bias)):
                gradient_V = gradients.products_nV.sum(dim=0, dtype=layer.bias.dtype)
                self.inputs.gradient(id(layer.bias))[: self.vocab_size].add_(gradient_V)
        if self.head.added is not None and made.added_Pr is not None and gradients.logits_nV is not None:
            self._pull_matrix(self.head.added.weight, gradients.logits_nV, made.added_Pr)
        self.pull_rows(made.entering, self.rows(made, gradients))

    def rows(self, made: Made, gradients: Gradients) -> RowGradients:
        """Return the gradients of what enters the matrices."""
        count, dtype = len(made.entering.entering_nD), made.entering.entering_nD.dtype
        entering_nD = added_nr = None
        if gradients.products_nV is not None:
            matrix_VD = self._matrix(self.head.linear(made.entering.depth).weight)
            entering_nD = _product(gradients.products_nV, matrix_VD)[:count].to(dtype)
        if self.head.added is not None and gradients.logits_nV is not None:
            added_nr = _product(gradients.logits_nV, self._matrix(self.head.added.weight))[:count].to(dtype)
        return RowGradients(entering_nD, added_nr, gradients.confidence_n)

    def pull_rows(self, entering: Entering, gradients: RowGradients) -> None:
        """Propagate gradients to the layers before the matrix and to the states."""
        depth, states_nD = entering.depth, entering.states_nD
        own_nD = gradients.entering_nD
        if self.head.before is not None and own_nD is not None:
            weights = [weight for weight in self.head.before.parameters() if self.inputs.needs(id(weight))]
            own_nD, *others = torch.autograd.grad(
                entering.entering_nD, [states_nD, *weights], own_nD, allow_unused=True
            )
            for weight, gradient in zip(weights, others, strict=True):
                if gradient is not None:
                    self.inputs.gradient(id(weight)).add_(gradient)
        # A depth has at most one row at each position.
        if self.inputs.needs(("states", depth)):
            parts = [torch.zeros_like(states_nD) if own_nD is None else own_nD]
            if self.head.added is not None:
                width = self.head.added.in_features
                empty_nr = states_nD.new_zeros(len(states_nD), width)
                parts.append(empty_nr if gradients.added_nr is None else gradients.added_nr)
            whole_nD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            self.inputs.gradient(("states", depth)).index_copy_(0, entering.index_n, whole_nD)
        if gradients.confidence_n is not None and self.inputs.needs(("confidence", depth)):
            self.inputs.gradient(("confidence", depth)).index_copy_(0, entering.index_n, gradients.confidence_n)

    def _added(self, added_Pr: Tensor, count: int) -> Tensor:
        assert self.head.added is not None
        with torch.autocast(added_Pr.device.type, enabled=False):
            return linear(added_Pr, self._matrix(self.head.added.weight))[:count]

    def _pull_matrix(self, weight_VD: Tensor, gradient_nV: Tensor, multiplied_PD: Tensor) -> None:
        if self.inputs.needs(id(weight_VD)):
            gradient_VD = self.inputs.gradient(id(weight_VD))[: self.vocab_size]
            _add_product(gradient_VD, in_few_sizes(gradient_nV.to(multiplied_PD.dtype)).t(), multiplied_PD)

    def _matrix(self, weight_VD: Tensor) -> Tensor:
        """Return the matrix rows of the shared ids, in autocast's type; a frozen matrix keeps its own type."""
        key, kind = id(weight_VD), weight_VD.device.type
        if key not in self._cast:
            trained = weight_VD.requires_grad and weight_VD.dtype != torch.float64
            mixed = trained and torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if mixed else weight_VD.dtype
            self._cast[key] = weight_VD.detach()[: self.vocab_size].to(dtype)
        return self._cast[key]


def _times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient * factor.to(gradient.dtype)


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _product(gradient_nV: Tensor, matrix_VD: Tensor) -> Tensor:
    with torch.autocast(matrix_VD.device.type, enabled=False):
        return in_few_sizes(gradient_nV.to(matrix_VD.dtype)) @ matrix_VD


def _add_product(sum_VD: Tensor, left_Vn: Tensor, right_nD: Tensor) -> None:
    """Add a product to a sum, which may have a wider type."""
    if sum_VD.dtype == left_Vn.dtype:
        sum_VD.addmm_(left_Vn, right_nD)
    elif ADDS_IN_FLOAT32 and sum_VD.is_cuda and sum_VD.dtype == torch.float32:
        # One pass over the sum without rounding. A temporary product would be as large as the matrix.
        torch.addmm(sum_VD, left_Vn, right_nD, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD.add_(left_Vn @ right_nD)
