"""The loss of a micro-batch with its gradient in one go: a piece of logits is made, read, and turned into gradients while it is there.

The idea is that of fused linear cross-entropies (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, 3.2), for any loss, drafter
vocabulary and number of depths: nothing as wide as the vocabulary is kept for the backward pass, which only scales.

N = rows, n = rows of a part, R = positions of the batch, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from drafttrain.core.linear_head import LinearHead
from drafttrain.core.records import DraftOutput
from drafttrain.losses.pieces import ACCEPTANCE, Part, Piece, RowValues, TargetPiece

KEPT_BYTES = 4 * 2**30
"""A loss whose rows depend on each other needs the target twice: its rows up to this size are kept, larger ones computed again."""

KEPT_LOGITS_BYTES = 256 * 2**20
"""The same of the drafter's logits."""

Totals = tuple[Tensor, Tensor, Tensor | None]
"""(the sum over rows, loss_N, acceptance_N), the last two without gradient."""


def are_spread(drafted: DraftOutput) -> bool:
    """Return whether ZeRO-3 spreads weights of the drafter's head: it marks them, and they are whole only within a forward."""
    head = drafted.head
    return isinstance(head, LinearHead) and any(
        hasattr(weight, "ds_id") for depth in drafted.states_BTD for weight in head.parameters(depth)
    )


def can_be_fused(drafted: DraftOutput) -> bool:
    """Return whether the parts of the drafter's head are known, and all of their weights are where its states are."""
    if not isinstance(drafted.head, LinearHead) or are_spread(drafted):
        return False
    return all(
        weight.device == states.device
        for depth, states in drafted.states_BTD.items()
        for weight in drafted.head.parameters(depth)
    )


def fused_loss(values: RowValues, drafted: DraftOutput, planned: Sequence[Piece]) -> Totals:
    """Return the loss of the planned pieces. Its gradient is computed here, and is there for one backward pass."""
    work = _Work(values, drafted, planned)
    total, loss_N, acceptance_N = _Fused.apply(work, *work.inputs)
    return total, loss_N, acceptance_N


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *inputs: Tensor) -> Totals:
        work.needed = ctx.needs_input_grad[1:]
        total, loss_N, acceptance_N = work.run()
        ctx.gradients = work.gradients
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(told for told in (loss_N, acceptance_N) if told is not None))
        return total, loss_N, acceptance_N

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of a fused loss is given once"
        return None, *(given if given is None else given.mul_(gradient) for given in gradients)


@dataclass(frozen=True)
class _Logits:
    """Logits of a part and what their gradient is turned into."""

    states_nD: Tensor
    entering_nD: Tensor
    multiplied_nD: Tensor
    logits_nV: Tensor


class _Work:
    """One forward pass over the pieces, and the gradients that it leaves."""

    def __init__(self, values: RowValues, drafted: DraftOutput, planned: Sequence[Piece]) -> None:
        assert isinstance(drafted.head, LinearHead)
        self.values = values
        self.head = drafted.head
        self.planned = planned
        self.factors = {depth: drafted.depth_weights.get(depth, 1.0) for depth in drafted.states_BTD}
        self.states_RD = {depth: states.flatten(0, 1) for depth, states in drafted.states_BTD.items()}
        weights = {id(weight): weight for depth in self.states_RD for weight in self.head.parameters(depth)}
        self.inputs = [*self.states_RD.values(), *weights.values()]
        self.place = {name: number for number, name in enumerate([*self.states_RD, *weights])}
        self.needed: Sequence[bool] = ()
        self.gradients: list[Tensor | None] = [None] * len(self.inputs)
        self._cast: dict[int, Tensor] = {}
        self._targets: dict[int, TargetPiece | None] = {}
        self._kept: dict[int, _Logits] = {}

    def run(self) -> Totals:
        """Return the sums and numbers of all rows; the gradients of the total are in `gradients` then."""
        if not self.planned:
            # Nothing is trained here, yet gradients must come in the order of the other ranks: ZeRO adds them up by place.
            loss_N, acceptance_N = torch.zeros(0, device=self.inputs[0].device), None
        else:
            loss_N, acceptance_N = self._at_once() if self.values.loss.pointwise else self._in_two_passes()
        for number, (given, needed) in enumerate(zip(self.inputs, self.needed, strict=True)):
            if needed and self.gradients[number] is None:
                self.gradients[number] = torch.zeros_like(given)
        return loss_N.sum(), loss_N, acceptance_N

    def _at_once(self) -> tuple[Tensor, Tensor | None]:
        """Take each part's loss and gradient in turn."""
        found: dict[str, Tensor] = {}
        for part, target in self._parts(keep=False):
            made = self._logits(part)
            with torch.enable_grad():
                logits_nV, named = self._values(part, target, made)
                accepted_n = named.pop(ACCEPTANCE, None)
                index = self.values.rows.index.part(part.rows)
                loss_n = (
                    self.values.combined(named, index, self.values.learnable(part, target)) * self.factors[part.depth]
                )
                total = loss_n.sum()
            self._pull(part, made, total, logits_nV)
            self._note(
                found, part, {"loss": loss_n.detach()} | ({} if accepted_n is None else {ACCEPTANCE: accepted_n})
            )
        return found["loss"], found.get(ACCEPTANCE)

    def _in_two_passes(self) -> tuple[Tensor, Tensor | None]:
        """Take the numbers of all rows, then how the total changes with each of them, then the gradients."""
        values = self.values
        found: dict[str, Tensor] = {}
        learnable: dict[str, Tensor] = {}
        for part, target in self._parts(keep=True):
            made = self._logits(part)
            self._keep(part, made)
            self._note(found, part, self._values(part, target, made)[1])
            if (learnable_n := values.learnable(part, target)) is not None:
                self._note(learnable, part, {"rows": learnable_n})
        acceptance_N = found.pop(ACCEPTANCE, None)
        with torch.enable_grad():
            leaves = {name: value_N.requires_grad_() for name, value_N in found.items()}
            loss_N = values.combined(leaves, values.rows.index, learnable.get("rows"))
            weights_N = values.weights_N(self.factors)
            loss_N = loss_N if weights_N is None else loss_N * weights_N
            known = torch.autograd.grad(loss_N.sum(), list(leaves.values()), allow_unused=True)
        slopes = dict(zip(leaves, known, strict=True))
        values.measured = False
        for part, target in self._parts(keep=True):
            start = part.rows.start
            made = self._kept.pop(start) if start in self._kept else self._logits(part)
            with torch.enable_grad():
                logits_nV, named = self._values(part, target, made)
                sums = [
                    (slope_N[part.rows] * value_n).sum()
                    for name, value_n in named.items()
                    if (slope_N := slopes[name]) is not None and value_n.requires_grad
                ]
                total = torch.stack(sums).sum() if sums else None
            if total is not None:
                self._pull(part, made, total, logits_nV)
        return loss_N.detach(), acceptance_N

    def _parts(self, *, keep: bool) -> Iterator[tuple[Part, TargetPiece | None]]:
        """Yield every part with the target's rows of its piece."""
        for number, piece in enumerate(self.planned):
            target = self._targets[number] if number in self._targets else self.values.target_of(piece)
            if keep and target is not None:
                whole = sum(held.logits_UR.nbytes for held in self._targets.values() if held is not None)
                if number in self._targets or whole + target.logits_UR.nbytes <= KEPT_BYTES:
                    # A copy, without what was computed of it.
                    self._targets[number] = replace(target)
            for part in piece.parts:
                yield part, target

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
        multiplied_nD = entering_nD.detach().to(matrix_VD.dtype)
        bias_V = None if layer.bias is None else layer.bias.detach()[: len(matrix_VD)].to(matrix_VD.dtype)
        with torch.autocast(states_RD.device.type, enabled=False):
            logits_nV = linear(multiplied_nD, matrix_VD, bias_V)
        return _Logits(states_nD, entering_nD, multiplied_nD, logits_nV)

    def _matrix(self, weight_VD: Tensor) -> Tensor:
        """Return the rows of the shared ids, in the type that autocast multiplies in."""
        key, kind = id(weight_VD), weight_VD.device.type
        if key not in self._cast:
            mixed = torch.is_autocast_enabled(kind) and weight_VD.dtype != torch.float64
            dtype = torch.get_autocast_dtype(kind) if mixed else weight_VD.dtype
            self._cast[key] = weight_VD.detach()[: self.values.vocab_size].to(dtype)
        return self._cast[key]

    def _values(self, part: Part, target: TargetPiece | None, made: _Logits) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits as a leaf, and the named values of a part, differentiable in them."""
        logits_nV = made.logits_nV.detach().requires_grad_(torch.is_grad_enabled())
        finished_nV = logits_nV if self.head.after is None else self.head.after(logits_nV)
        return logits_nV, self.values.of(part, target, finished_nV)

    def _pull(self, part: Part, made: _Logits, total: Tensor, logits_nV: Tensor) -> None:
        """Add the gradient of a part's total to the gradients of states and weights."""
        (gradient_nV,) = torch.autograd.grad(total, logits_nV)
        layer = self.head.linear(part.depth)
        if self._needs(id(layer.weight)):
            gradient_VD = self._gradient(id(layer.weight))[: self.values.vocab_size]
            if gradient_VD.dtype == gradient_nV.dtype:
                gradient_VD.addmm_(gradient_nV.t(), made.multiplied_nD)
            else:
                gradient_VD.add_(gradient_nV.t() @ made.multiplied_nD)
        if layer.bias is not None and self._needs(id(layer.bias)):
            self._gradient(id(layer.bias))[: self.values.vocab_size].add_(
                gradient_nV.sum(dim=0, dtype=layer.bias.dtype)
            )
        gradient_nD = gradient_nV @ self._matrix(layer.weight)
        self._pull_states(part, made, gradient_nD.to(made.entering_nD.dtype))

    def _pull_states(self, part: Part, made: _Logits, gradient_nD: Tensor) -> None:
        """Go on from the gradient of what the matrix multiplies."""
        if self.head.before is not None:
            weights = [weight for weight in self.head.before.parameters() if self._needs(id(weight))]
            gradient_nD, *others = torch.autograd.grad(
                made.entering_nD, [made.states_nD, *weights], gradient_nD, allow_unused=True
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
        """Return the gradient of an input as far as it is known."""
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
        """Write the numbers of a part to their places among those of all rows."""
        for name, value_n in named.items():
            if name not in found:
                found[name] = value_n.new_zeros(len(self.values.rows.tokens_N))
            found[name][part.rows] = value_n.detach()
