"""A weighted sum of losses, whose weights may change over the steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafttrain.core.loss_rows import LossRows
from drafttrain.core.settings import setting
from drafttrain.core.target_rows import RowIndex
from drafttrain.losses import Loss, losses


@dataclass
class Term:
    """One loss of a sum."""

    loss: Any = setting(help="A loss, by kind.", registry=losses)
    weight: float = setting(1.0, help="Factor on the loss; with `final_weight`, the factor up to `from_step`.")
    final_weight: float | None = setting(None, help="Factor at `until_step` and after; null: it does not change.")
    from_step: int = setting(0, help="Optimizer step from which the weight moves linearly to final_weight.", ge=0)
    until_step: int = setting(
        0, help="Optimizer step at which the weight has moved to final_weight; equal to from_step: at once.", ge=0
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if self.final_weight is None:
            set_to = {"from_step": self.from_step, "until_step": self.until_step}
            return [f"{name}: is not used without final_weight" for name, step in set_to.items() if step]
        if self.from_step > self.until_step:
            return [f"from_step: at most until_step {self.until_step}, got {self.from_step}"]
        return []

    def at(self, step: int) -> float:
        """Return the weight at an optimizer step, from 0."""
        if self.final_weight is None or step < self.from_step:
            return self.weight
        if step >= self.until_step:
            return self.final_weight
        share = (step - self.from_step) / (self.until_step - self.from_step)
        return self.weight + share * (self.final_weight - self.weight)


@dataclass
class WeightedSumSettings:
    """A weighted sum of losses with schedules."""

    terms: list[Term] = setting(help="The losses with their weights.")

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        if not self.terms:
            return ["terms: at least one is needed"]
        idle = [step for step in self._corners() if not any(term.at(step) for term in self.terms)]
        if idle:
            return [f"terms: at optimizer step {idle[0]} all weights are 0: nothing is trained"]
        lengths = sorted(self.block_lengths())
        return [f"terms: block_length must be the same in all terms, got {lengths}"] if len(lengths) > 1 else []

    def _corners(self) -> list[int]:
        """Return the steps between which all weights move linearly."""
        return sorted({0, *(step for term in self.terms for step in (term.from_step, term.until_step))})

    def block_lengths(self) -> set[int]:
        """Return the block lengths of all terms, those of nested sums included."""
        inner = [term.loss for term in self.terms]
        own = {loss.block_length for loss in inner if hasattr(loss, "block_length")}
        return own.union(*(loss.block_lengths() for loss in inner if isinstance(loss, WeightedSumSettings)))


@losses.register("sum", WeightedSumSettings)
class WeightedSum(Loss):
    """sum_i w_i(step) loss_i.

    Staged distillation (Rajbhandari et al. 2022, DeepSpeed-MoE, arXiv 2201.05596, 4.2) is a term whose weight falls to 0.
    """

    def __init__(self, settings: WeightedSumSettings) -> None:
        super().__init__()
        self.weights = settings.terms
        self.parts = torch.nn.ModuleList(losses.build(term.loss) for term in settings.terms)

    @property
    def _losses(self) -> list[Loss]:
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.needs_target for part in self._losses)

    @property
    def pointwise(self) -> bool:
        """Whether every part is."""
        return all(part.pointwise for part in self._losses)

    @property
    def block_length(self) -> int:
        """The longest block length of any part."""
        return max(part.block_length for part in self._losses)

    @property
    def runs_without_target(self) -> bool:
        """Whether any part does."""
        return any(part.runs_without_target for part in self._losses)

    def reads_target(self, step: int) -> bool:
        """Return whether a part does whose weight is not 0."""
        return any(
            term.at(step) and part.reads_target(step) for term, part in zip(self.weights, self._losses, strict=True)
        )

    def per_row(self, rows: LossRows) -> Mapping[str, Tensor]:
        """Return every part's values under its number; without a target, of the parts that run without one."""
        return {
            f"{number}.{name}": value
            for number, part in enumerate(self._losses)
            if rows.target_logits_NV is not None or part.runs_without_target
            for name, value in part.per_row(rows).items()
        }

    def combine(self, values: Mapping[str, Tensor], index: RowIndex) -> Tensor:
        """Return the weighted sum of the parts."""
        total = torch.zeros(())
        for number, (part, term) in enumerate(zip(self._losses, self.weights, strict=True)):
            own = {
                name.split(".", 1)[1]: value for name, value in values.items() if name.split(".", 1)[0] == str(number)
            }
            if own:
                total = total + term.at(index.step) * part.combine(own, index)
        return total

    def end_of_step(self) -> None:
        """End the step in every part."""
        for part in self._losses:
            part.end_of_step()
