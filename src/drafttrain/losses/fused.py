"""The loss of a micro-batch and its gradient in one pass: each piece of logits is computed, read and turned into gradients at once.

The idea is that of fused linear cross-entropies (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, 3.2), for any loss, drafter
vocabulary and number of depths: nothing as wide as the vocabulary is stored for the backward pass, which only scales.

N = rows, n = rows of a part, R = positions of the batch, V = vocabulary, D = hidden
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.batches import DraftOutput
from drafttrain.core.linear_head import LinearHead
from drafttrain.losses.head_products import Entering, HeadProducts, Inputs, JoinedGradients, Leaves, Made, RowGradients
from drafttrain.losses.pieces import ACCEPTANCE, Part, Piece, RowValues, TargetPiece, bands, target_of

KEPT_BYTES = 4 * 2**30
"""A loss whose rows depend on each other reads the target twice: rows up to this size are stored, larger ones computed again."""

KEPT_LOGITS_BYTES = 256 * 2**20
"""The same limit for the drafter's logits."""

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
        terms: The drafts with their loss; then the terms trained beside them, which are only part of the total.
    """
    works = [_Work(values, drafted) for values, drafted in terms]
    given = [tensor for work in works for tensor in work.inputs.tensors]
    total, loss_N, acceptance_N = _Fused.apply(works, planned, *given)
    return total, loss_N, acceptance_N


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, works: Sequence[_Work], planned: Sequence[Piece], *inputs: Tensor) -> Totals:
        needed = iter(ctx.needs_input_grad[2:])
        for work in works:
            work.inputs.needed = [next(needed) for _ in work.inputs.tensors]
        _run(works, planned)
        (loss_N, acceptance_N), *others = (work.finish() for work in works)
        ctx.gradients = [gradient for work in works for gradient in work.inputs.gradients]
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
class _Band:
    """Rows whose logits the arithmetic of a loss reads at once."""

    rows: slice
    """Which of the rows of their part."""
    part: Part
    """These rows as a part."""


class _Work:
    """One term's forward pass over its parts, and its gradients."""

    def __init__(self, values: RowValues, drafted: DraftOutput) -> None:
        head = drafted.head
        assert isinstance(head, LinearHead)
        self.values = values
        self.at_once = values.loss.pointwise
        self.factors = {depth: drafted.depth_weights.get(depth, 1.0) for depth in drafted.states_BTD}
        self._states_RD = {depth: states.flatten(0, 1) for depth, states in drafted.states_BTD.items()}
        self._confidence_R = {depth: scores.flatten() for depth, scores in drafted.confidence_BT.items()}
        named: dict[Hashable, Tensor] = {("states", depth): states for depth, states in self._states_RD.items()}
        named |= {("confidence", depth): scores for depth, scores in self._confidence_R.items()}
        named |= {id(weight): weight for depth in self._states_RD for weight in head.parameters(depth)}
        self.inputs = Inputs(named)
        self._products = HeadProducts(head, self.inputs, vocab_size=values.vocab_size)
        self._kept: dict[int, Made] = {}
        self._unscaled: list[tuple[Part, Entering, dict[str, RowGradients]]] = []
        """Of each part: the gradients of its named values, through a frozen matrix."""
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
        return self.at_once or all(self._products.is_frozen(depth) for depth in self._states_RD)

    def read(self, part: Part, target: TargetPiece | None) -> None:
        """Compute the values of a part; for a pointwise loss also its gradients."""
        made = self._made(part)
        if not self.at_once:
            self._dependent(part, target, made)
            return
        joined = JoinedGradients(made, in_place=True)
        for band in self._bands(part, made):
            with torch.enable_grad():
                leaves, named = self._values(band, target, made)
                accepted_n = named.pop(ACCEPTANCE, None)
                index = self.values.rows.index.part(band.part.rows)
                learnable_n = self.values.learnable(band.part, target)
                loss_n = self.values.combined(named, index, learnable_n) * self.factors[part.depth]
                if (scale_N := self.values.rows.scale_N) is not None:
                    loss_n = loss_n * scale_N[band.part.rows]
                total = loss_n.sum()
            joined.add(band.rows, leaves.gradients(total))
            accepted = {} if accepted_n is None else {ACCEPTANCE: accepted_n}
            self._note(self._found, band.part, {"loss": loss_n.detach()} | accepted)
        self._products.pull(made, joined.whole())

    def _dependent(self, part: Part, target: TargetPiece | None, made: Made) -> None:
        """Compute the values of a part whose gradients are computed when those of all rows are known."""
        joined: dict[str, JoinedGradients] = {}
        if not self.reads_once:
            self._keep(part, made)
        for band in self._bands(part, made):
            with torch.set_grad_enabled(self.reads_once):
                leaves, named = self._values(band, target, made)
                sums = {name: value_n.sum() for name, value_n in named.items() if value_n.requires_grad}
            for name, total in sums.items():
                of_value = joined.setdefault(name, JoinedGradients(made, in_place=False))
                of_value.add(band.rows, leaves.gradients(total, again=True))
            self._note(self._found, band.part, named)
        if (learnable_n := self.values.learnable(part, target)) is not None:
            self._note(self._learnable, part, {"rows": learnable_n})
        if self.reads_once:
            gradients = {name: self._products.rows(made, of_value.whole()) for name, of_value in joined.items()}
            self._unscaled.append((part, made.entering, gradients))

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
        for part, entering, of_values in self._unscaled:
            scaled = [
                of_value.times(slope_N[part.rows])
                for name, of_value in of_values.items()
                if (slope_N := self._slopes[name]) is not None
            ]
            if scaled:
                self._products.pull_rows(entering, reduce(RowGradients.plus, scaled))

    def pull(self, part: Part, target: TargetPiece | None) -> None:
        """Compute the gradients of a part from the derivatives of the total in its values."""
        start = part.rows.start
        made = self._kept.pop(start) if start in self._kept else self._made(part)
        joined = JoinedGradients(made, in_place=True)
        for band in self._bands(part, made):
            with torch.enable_grad():
                leaves, named = self._values(band, target, made)
                sums = [
                    (slope_N[band.part.rows] * value_n).sum()
                    for name, value_n in named.items()
                    if (slope_N := self._slopes[name]) is not None and value_n.requires_grad
                ]
                total = torch.stack(sums).sum() if sums else None
            if total is not None:
                joined.add(band.rows, leaves.gradients(total))
        self._products.pull(made, joined.whole())

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Return (loss_N, acceptance_N), and complete the gradients."""
        self.inputs.complete()
        if not self._found:
            return torch.zeros(0, device=self.inputs.tensors[0].device), None
        return self._found["loss"], self._found.get(ACCEPTANCE)

    def _made(self, part: Part) -> Made:
        """Return the products of a part, without gradient."""
        return self._products.made(self._states_RD[part.depth], part.depth, self.values.rows.drafter_N[part.rows])

    def _bands(self, part: Part, made: Made) -> list[_Band]:
        start = part.rows.start
        return [
            _Band(rows, replace(part, rows=slice(start + rows.start, start + rows.stop)))
            for rows in bands(made.products_nV)
        ]

    def _values(self, band: _Band, target: TargetPiece | None, made: Made) -> tuple[Leaves, dict[str, Tensor]]:
        """Return the named values of a band, and what they are differentiable in."""
        scores_R = self._confidence_R.get(band.part.depth)
        scores_n = None if scores_R is None else scores_R.index_select(0, made.entering.index_n[band.rows])
        leaves = self._products.leaves(made, band.rows, scores_n)
        return leaves, self.values.of(band.part, target, leaves.logits_nV, leaves.confidence_n)

    def _keep(self, part: Part, made: Made) -> None:
        size = len(self.values.rows.tokens_N) * made.products_nV.shape[1] * made.products_nV.element_size()
        if size <= KEPT_LOGITS_BYTES:
            self._kept[part.rows.start] = made

    def _note(self, found: dict[str, Tensor], part: Part, named: dict[str, Tensor]) -> None:
        """Write the values of a part to its rows."""
        for name, value_n in named.items():
            if name not in found:
                found[name] = value_n.new_zeros(len(self.values.rows.tokens_N))
            found[name][part.rows] = value_n.detach()
