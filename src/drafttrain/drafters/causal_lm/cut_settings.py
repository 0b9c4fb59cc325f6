"""Which part of its target a drafter starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from drafttrain.core.errors import CheckpointError
from drafttrain.core.settings import setting


@dataclass
class CutSettings:
    """The part of the target that a drafter with `init: target` starts from."""

    layers: Literal["spread", "first", "last", "ablation"] | list[int] = setting(
        "spread",
        help="Which num_layers decoder layers of the target: evenly spaced, the first, the last, those that remain after the layers whose "
        "absence changes the target's distribution least were removed one by one (ablation), or their numbers from 0.",
        ge=0,
    )
    experts: int | None = setting(
        None,
        help="Make the drafter of a mixture of experts dense: the experts of each layer that training texts are routed to most, so many of "
        "them, become one feed-forward block. null: it keeps all experts and their router.",
        ge=1,
    )
    join: Literal["side_by_side", "averaged"] = setting(
        "side_by_side",
        help="With experts. side_by_side: a block with the neurons of all of them, weighed by their mean gates; averaged: as wide as one "
        "expert, with the mean of their weights.",
    )
    shares: list[list[float]] | None = setting(
        None,
        help="With experts: by layer of the target, the mean gate of each of its experts; none for a layer without. null: measured on "
        "training texts.",
        ge=0,
    )
    texts: int = setting(
        16, help="Training texts on which layers and experts are chosen; not read if nothing is chosen.", ge=1
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = []
        if isinstance(self.layers, list) and not are_layers(self.layers):
            problems.append(f"layers: at least one number, ascending, each once, got {self.layers}")
        if self.experts is None:
            usual = CutSettings.__dataclass_fields__
            problems += [
                f"{name}: is not used without experts"
                for name in ("join", "shares")
                if getattr(self, name) != usual[name].default
            ]
        return problems

    def problems(self, *, num_layers: int) -> list[str]:
        """Return what does not fit a drafter of so many layers."""
        if isinstance(self.layers, list) and len(self.layers) != num_layers:
            return [f"cut.layers: {len(self.layers)} layers are listed, and num_layers is {num_layers}: give as many"]
        return []

    @property
    def chooses(self) -> bool:
        """Whether training texts decide."""
        return self.layers == "ablation" or self.measures_routing

    @property
    def measures_routing(self) -> bool:
        """Whether training texts tell which experts matter."""
        return self.experts is not None and self.shares is None

    def any_choice(self) -> Self:
        """Return settings of the same sizes that no text decides."""
        return replace(self, layers="spread") if self.layers == "ablation" else self

    def layer_numbers(self, total: int, count: int) -> list[int]:
        """Return the numbers of the layers, ascending.

        Args:
            total: Layers of the target.
            count: Layers of the drafter.

        Raises:
            CheckpointError: The target has fewer.
        """
        if not 1 <= count <= total:
            raise CheckpointError(f"drafter.num_layers must be 1..{total} for this target, got {count}")
        if isinstance(self.layers, list):
            if self.layers[-1] >= total:
                raise CheckpointError(
                    f"drafter.cut.layers must be of 0..{total - 1} for this target, got {self.layers[-1]}"
                )
            return self.layers
        assert self.layers != "ablation", "the run chooses the layers before it makes the drafter"
        numbers: dict[str, Sequence[int]] = {
            "spread": spread(total, count),
            "first": range(count),
            "last": range(total - count, total),
        }
        return list(numbers[self.layers])


def are_layers(value: Any) -> bool:
    """Return whether a value is a list of layers by number: at least one, ascending, each once."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(one) is int and one >= 0 for one in value)
        and value == sorted(set(value))
    )


def spread(total: int, count: int) -> list[int]:
    """Return `count` layer numbers spread evenly over 0..total-1, including first and last if count > 1."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]
