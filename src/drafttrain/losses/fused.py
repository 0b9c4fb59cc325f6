"""The loss of a micro-batch and its gradient in one pass: each piece of logits is computed, read and turned into gradients at once.

The idea is that of fused linear cross-entropies (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, 3.2), for any loss, drafter
vocabulary and number of depths: nothing as wide as the vocabulary is stored for the backward pass, which only scales.

N = rows, n = rows of a part, P = these with padding, R = positions of the batch, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from drafttrain.core.batches import DraftOutput
from drafttrain.core.few_sizes import in_few_sizes
from drafttrain.core.linear_head import LinearHead
from drafttrain.losses.pieces import ACCEPTANCE, Part, Piece, RowValues, TargetPiece, target_of

KEPT_BYTES = 4 * 2**30
"""A loss whose rows depend on each other reads the target twice: rows up to this size are stored, larger ones computed again."""

KEPT_LOGITS_BYTES = 256 * 2**20
"""The same limit for the drafter's logits."""

ADDS_IN_FLOAT32 = torch.__version__ >= "2.11"
"""From this version on, CUDA can add a product of half types to a float32 matrix in place."""

Totals = tuple[Tensor, Tensor, Tensor | None]
"""(the sum over rows, loss_N, acceptance_N), the last two without gradient."""


def are_spread(drafted: DraftOutput) -> bool:
    """Return whether ZeRO-3 partitions weights of the drafter's head; they are gathered only during a forward."""
    head = drafted.head
    return isinstance(head, LinearHead) and any(
        hasattr(weight, "ds_id") for depth in drafted.states_BTD for weight in head.parameters(depth)
    )


def can_be_fused(drafted: DraftOutput) -> bool:
    """Return whether the parts of the drafter's head are known, with all weights on the device of its states."""
    if not isinstance(drafted.head, LinearHead) or are_spread(drafted):
        return False
    return all(
        weight.device == states.device
        for depth, states in drafted.states_BTD.items()
        for weight in drafted.head.parameters(depth)
    )


def fused_loss(terms: Sequence[tuple[RowValues, DraftOutput]], planned: Sequence[Piece]) -> Totals:
    """Return the loss of the planned pieces. Its gradient is computed here, for one backward pass.

    Args:
        terms: The drafts with their loss; then the term trained beside them, which is only part of the total.
    """
    works = [_Work(values, drafted) for values, drafted in terms]
    total, loss_N, acceptance_N = _Fused.apply(works, planned, *(given for work in works for given in work.inputs))
    return total, loss_N, acceptance_N


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, works: Sequence[_Work], planned: Sequence[Piece], *inputs: Tensor) -> Totals:
        needed = iter(ctx.needs_input_grad[2:])
        for work in works:
            work.needed = [next(needed) for _ in work.inputs]
        _run(works, planned)
        (loss_N, acceptance_N), *others = (work.finish() for work in works)
        ctx.gradients = [gradient for work in works for gradient in work.gradients]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(value_N for value_N in (loss_N, acceptance_N) if value_N is not None))
        return torch.stack([loss_N.sum(), *(beside_N.sum() for beside_N, _ in others)]).sum(), loss_N, acceptance_N

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of a fused loss is given once"
        return None, None, *(given if given is None else given.mul_(gradient) for given in gradients)


def _run(works: Sequence[_Work], planned: Sequence[Piece]) -> None:
    """Let each term read its parts of every piece. The target's rows of a piece are computed once for all terms."""
    values = [work.values for work in works]
    twice = any(not work.reads_once for work in works)
    targets: list[TargetPiece | None] = []
    kept_bytes = 0
    for piece in planned:
        target = target_of(values, piece)
        for part in piece.parts:
            works[part.term].read(part, target)
        kept_bytes += 0 if target is None else target.logits_UR.nbytes
        if twice:
            # A copy without the log-probabilities computed from it.
            targets.append(replace(target) if target is not None and kept_bytes <= KEPT_BYTES else None)
    for work in works:
        work.combine()
    for piece, kept in zip(planned, targets, strict=False):
        parts = [part for part in piece.parts if not works[part.term].reads_once]
        target = (kept or target_of(values, piece)) if parts else None
        for part in parts:
            works[part.term].pull(part, target)


@dataclass(frozen=True)
class _Entering:
    """What enters the matrix for a part, and the states that it is computed from."""

    states_nD: Tensor
    entering_nD: Tensor


@dataclass(frozen=True)
class _Logits:
    """Logits of a part, and the tensors that their gradient is propagated to."""

    entering: _Entering
    multiplied_PD: Tensor
    """With rows of padding."""
    logits_nV: Tensor


class _Work:
    """One term's forward pass over its parts, and its gradients."""

    def __init__(self, values: RowValues, drafted: DraftOutput) -> None:
        assert isinstance(drafted.head, LinearHead)
        self.values = values
        self.head = drafted.head
        self.at_once = values.loss.pointwise
        self.factors = {depth: drafted.depth_weights.get(depth, 1.0) for depth in drafted.states_BTD}
        self.states_RD = {depth: states.flatten(0, 1) for depth, states in drafted.states_BTD.items()}
        weights = {id(weight): weight for depth in self.states_RD for weight in self.head.parameters(depth)}
        self.inputs = [*self.states_RD.values(), *weights.values()]
        self.place = {name: number for number, name in enumerate([*self.states_RD, *weights])}
        self.needed: Sequence[bool] = ()
        self.gradients: list[Tensor | None] = [None] * len(self.inputs)
        self._cast: dict[int, Tensor] = {}
        self._kept: dict[int, _Logits] = {}
        self._unscaled: list[tuple[Part, _Entering, dict[str, Tensor]]] = []
        """Of each part: the derivatives of its named values in what enters a frozen matrix."""
        self._found: dict[str, Tensor] = {}
        """The named values of all rows; for a pointwise loss the loss is one of them."""
        self._learnable: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor | None] = {}
        """The derivative of the total in each value."""

    @property
    def reads_once(self) -> bool:
        """Whether logits are needed only once.

        A row's gradient is that of its values times factors, which a loss of dependent rows knows only after all rows. A row of
        the states' gradient is multiplied afterwards; a matrix's gradient is a sum over rows, so a trained matrix reads twice.
        """
        return self.at_once or not any(
            self._needs(id(weight))
            for depth in self.states_RD
            for weight in (self.head.linear(depth).weight, self.head.linear(depth).bias)
            if weight is not None
        )

    def read(self, part: Part, target: TargetPiece | None) -> None:
        """Compute the values of a part; for a pointwise loss also its gradients."""
        made = self._logits(part)
        if not self.at_once:
            self._note(self._found, part, self._dependent(part, target, made))
            if (learnable_n := self.values.learnable(part, target)) is not None:
                self._note(self._learnable, part, {"rows": learnable_n})
            return
        with torch.enable_grad():
            logits_nV, named = self._values(part, target, made)
            accepted_n = named.pop(ACCEPTANCE, None)
            index = self.values.rows.index.part(part.rows)
            loss_n = self.values.combined(named, index, self.values.learnable(part, target)) * self.factors[part.depth]
            if (scale_N := self.values.rows.scale_N) is not None:
                loss_n = loss_n * scale_N[part.rows]
            total = loss_n.sum()
        self._pull(part, made, total, logits_nV)
        accepted = {} if accepted_n is None else {ACCEPTANCE: accepted_n}
        self._note(self._found, part, {"loss": loss_n.detach()} | accepted)

    def _dependent(self, part: Part, target: TargetPiece | None, made: _Logits) -> dict[str, Tensor]:
        """Return the values of a part whose gradients are computed when those of all rows are known."""
        if not self.reads_once:
            self._keep(part, made)
            return self._values(part, target, made)[1]
        with torch.enable_grad():
            logits_nV, named = self._values(part, target, made)
            sums = {name: value_n.sum() for name, value_n in named.items() if value_n.requires_grad}
        derivatives_nD = {}
        for name, total in sums.items():
            (gradient_nV,) = torch.autograd.grad(total, logits_nV, retain_graph=True)
            derivatives_nD[name] = self._entering_gradient(part, made, in_few_sizes(gradient_nV))
        self._unscaled.append((part, made.entering, derivatives_nD))
        return named

    def combine(self) -> None:
        """Compute the loss from the values of all rows, unless the loss is pointwise."""
        if self.at_once or not self._found:
            return
        values = self.values
        accepted = {name: self._found.pop(name) for name in (ACCEPTANCE,) if name in self._found}
        with torch.enable_grad():
            leaves = {name: value_N.requires_grad_() for name, value_N in self._found.items()}
            loss_N = values.combined(leaves, values.rows.index, self._learnable.get("rows"))
            loss_N = values.weighted(loss_N, self.factors)
            known = torch.autograd.grad(loss_N.sum(), list(leaves.values()), allow_unused=True)
        self._slopes = dict(zip(leaves, known, strict=True))
        self._found = {"loss": loss_N.detach()} | accepted
        values.measured = False
        for part, entering, derivatives_nD in self._unscaled:
            scaled_nD = [
                derivative_nD * slope_N[part.rows, None].to(derivative_nD.dtype)
                for name, derivative_nD in derivatives_nD.items()
                if (slope_N := self._slopes[name]) is not None
            ]
            if scaled_nD:
                self._pull_states(part, entering, torch.stack(scaled_nD).sum(dim=0))

    def pull(self, part: Part, target: TargetPiece | None) -> None:
        """Compute the gradients of a part from the derivatives of the total in its values."""
        start = part.rows.start
        made = self._kept.pop(start) if start in self._kept else self._logits(part)
        with torch.enable_grad():
            logits_nV, named = self._values(part, target, made)
            sums = [
                (slope_N[part.rows] * value_n).sum()
                for name, value_n in named.items()
                if (slope_N := self._slopes[name]) is not None and value_n.requires_grad
            ]
            total = torch.stack(sums).sum() if sums else None
        if total is not None:
            self._pull(part, made, total, logits_nV)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return (loss_N, acceptance_N), and complete `gradients`.

        Even without trained rows here, the gradients must come in the order of the other ranks: ZeRO reduces them by position.
        """
        for number, (given, needed) in enumerate(zip(self.inputs, self.needed, strict=True)):
            if needed and self.gradients[number] is None:
                self.gradients[number] = torch.zeros_like(given)
        if not self._found:
            return torch.zeros(0, device=self.inputs[0].device), None
        return self._found["loss"], self._found.get(ACCEPTANCE)

    def _logits(self, part: Part) -> _Logits:
        """Return the logits of a part, cut to the shared ids, without gradient."""
        states_RD = self.states_RD[part.depth].detach()
        states_nD = states_RD.index_select(0, self.values.rows.drafter_N[part.rows])
        entering_nD = states_nD
        if self.head.before is not None:
            with torch.enable_grad():
                entering_nD = self.head.entering(states_nD.requires_grad_())
        layer = self.head.linear(part.depth)
        matrix_VD = self._matrix(layer.weight)
        multiplied_PD = in_few_sizes(entering_nD.detach().to(matrix_VD.dtype))
        bias_V = None if layer.bias is None else layer.bias.detach()[: len(matrix_VD)].to(matrix_VD.dtype)
        with torch.autocast(states_RD.device.type, enabled=False):
            logits_nV = linear(multiplied_PD, matrix_VD, bias_V)[: len(states_nD)]
        return _Logits(_Entering(states_nD, entering_nD), multiplied_PD, logits_nV)

    def _matrix(self, weight_VD: Tensor) -> Tensor:
        """Return the matrix rows of the shared ids, in autocast's type; a frozen matrix keeps its own type."""
        key, kind = id(weight_VD), weight_VD.device.type
        if key not in self._cast:
            trained = weight_VD.requires_grad and weight_VD.dtype != torch.float64
            mixed = trained and torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if mixed else weight_VD.dtype
            self._cast[key] = weight_VD.detach()[: self.values.vocab_size].to(dtype)
        return self._cast[key]

    def _values(self, part: Part, target: TargetPiece | None, made: _Logits) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits as a leaf, and the named values of a part, which are differentiable in them."""
        logits_nV = made.logits_nV.detach().requires_grad_(torch.is_grad_enabled())
        finished_nV = logits_nV if self.head.after is None else self.head.after(logits_nV)
        return logits_nV, self.values.of(part, target, finished_nV)

    def _pull(self, part: Part, made: _Logits, total: Tensor, logits_nV: Tensor) -> None:
        """Add the gradient of a part's total to the gradients of states and weights."""
        (gradient_nV,) = torch.autograd.grad(total, logits_nV)
        gradient_PV = in_few_sizes(gradient_nV)
        layer = self.head.linear(part.depth)
        if self._needs(id(layer.weight)):
            gradient_VD = self._gradient(id(layer.weight))[: self.values.vocab_size]
            _add_product(gradient_VD, gradient_PV.t(), made.multiplied_PD)
        if layer.bias is not None and self._needs(id(layer.bias)):
            self._gradient(id(layer.bias))[: self.values.vocab_size].add_(
                gradient_nV.sum(dim=0, dtype=layer.bias.dtype)
            )
        self._pull_states(part, made.entering, self._entering_gradient(part, made, gradient_PV))

    def _entering_gradient(self, part: Part, made: _Logits, gradient_PV: Tensor) -> Tensor:
        """Return the gradient of the matrix's input."""
        matrix_VD = self._matrix(self.head.linear(part.depth).weight)
        with torch.autocast(matrix_VD.device.type, enabled=False):
            gradient_PD = gradient_PV @ matrix_VD
        entering_nD = made.entering.entering_nD
        return gradient_PD[: len(entering_nD)].to(entering_nD.dtype)

    def _pull_states(self, part: Part, entering: _Entering, gradient_nD: Tensor) -> None:
        """Propagate the gradient of the matrix's input to the layers before it and to the states."""
        if self.head.before is not None:
            weights = [weight for weight in self.head.before.parameters() if self._needs(id(weight))]
            gradient_nD, *others = torch.autograd.grad(
                entering.entering_nD, [entering.states_nD, *weights], gradient_nD, allow_unused=True
            )
            for weight, gradient in zip(weights, others, strict=True):
                if gradient is not None:
                    self._gradient(id(weight)).add_(gradient)
        if self._needs(part.depth):
            # A depth has at most one row at each position.
            self._gradient(part.depth).index_copy_(0, self.values.rows.drafter_N[part.rows], gradient_nD)

    def _needs(self, name: int) -> bool:
        return self.needed[self.place[name]]

    def _gradient(self, name: int) -> Tensor:
        """Return the gradient of an input, accumulated so far."""
        number = self.place[name]
        known = self.gradients[number]
        if known is None:
            known = self.gradients[number] = torch.zeros_like(self.inputs[number])
        return known

    def _keep(self, part: Part, made: _Logits) -> None:
        size = len(self.values.rows.tokens_N) * made.logits_nV.shape[1] * made.logits_nV.element_size()
        if size <= KEPT_LOGITS_BYTES:
            self._kept[part.rows.start] = made

    def _note(self, found: dict[str, Tensor], part: Part, named: dict[str, Tensor]) -> None:
        """Write the values of a part to its rows."""
        for name, value_n in named.items():
            if name not in found:
                found[name] = value_n.new_zeros(len(self.values.rows.tokens_N))
            found[name][part.rows] = value_n.detach()


def _add_product(sum_VD: Tensor, left_Vn: Tensor, right_nD: Tensor) -> None:
    """Add a product to a sum, which may have a wider type."""
    if sum_VD.dtype == left_Vn.dtype:
        sum_VD.addmm_(left_Vn, right_nD)
    elif ADDS_IN_FLOAT32 and sum_VD.is_cuda and sum_VD.dtype == torch.float32:
        # One pass over the sum without rounding. A temporary product would be as large as the matrix.
        torch.addmm(sum_VD, left_Vn, right_nD, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD.add_(left_Vn @ right_nD)
