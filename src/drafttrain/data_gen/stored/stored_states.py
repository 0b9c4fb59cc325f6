"""The types in which states are stored, and what a narrow type costs.

N = rows, D = hidden, S = stored bytes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from drafttrain.core.eight_bit import as_states, in_eight_bits
from drafttrain.core.errors import DataError
from drafttrain.core.probability import acceptance_rate
from drafttrain.data_gen.stored.head_rounding import rounded_for_head
from drafttrain.target_model import Target
from drafttrain.target_model.logits import head_logits

SAMPLED = 16
"""Tokens of one call of the target on which the cost is measured."""


def states_as(dtype: str, states_ND: Tensor, *, final_of: Target | None = None) -> Tensor:
    """Return states in the type that is stored.

    Args:
        final_of: The target whose final states they are; its distribution may be computed from them.

    Raises:
        DataError: A state overflows the type.
    """
    stored_ND = states_ND if dtype == "int8" else states_ND.to(getattr(torch, dtype))
    if not torch.isfinite(stored_ND).all():
        raise DataError(f"data.cache_dtype: a state of the target overflows {dtype}: choose bfloat16 or float32")
    if dtype != "int8":
        return stored_ND
    if final_of is None:
        return in_eight_bits(states_ND)
    return rounded_for_head(states_ND, final_of.model, num_tokens=final_of.num_tokens)


def as_array(stored: Tensor) -> Any:
    """Return a tensor as a numpy array; numpy has no bfloat16, so its bits are stored as int16."""
    stored = stored.cpu()
    return stored.view(torch.int16).numpy() if stored.dtype == torch.bfloat16 else stored.numpy()


def as_tensor(array: Any, dtype: str) -> Tensor:
    """Return a stored array of a cache of this type as a tensor."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" and tensor.dtype == torch.int16 else tensor


@dataclass(frozen=True)
class Cost:
    """How much the acceptance of any drafter can change because final states are stored in a narrow type, on sampled tokens."""

    tokens: int = 0
    total: float = 0.0
    worst: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.total + other.total, max(self.worst, other.worst))

    @classmethod
    @torch.no_grad()
    def measured(cls, exact_ND: Tensor, stored_NS: Tensor, target: Target) -> Self:
        """Return 1 - sum min(p, p') of some rows, p' being the distribution that the target's head computes from stored states."""
        index_n = torch.linspace(0, len(exact_ND) - 1, min(SAMPLED, len(exact_ND)), device=exact_ND.device).long()
        exact_nD, stored_nD = exact_ND[index_n], as_states(stored_NS[index_n]).to(exact_ND.dtype)
        if torch.equal(exact_nD, stored_nD):
            return cls(len(index_n))
        p_nV, stored_p_nV = (
            head_logits(target.model, one.to(target.model.dtype))[:, : target.num_tokens].double().softmax(dim=-1)
            for one in (exact_nD, stored_nD)
        )
        cost_n = (1 - acceptance_rate(p_nV, stored_p_nV)).clamp_min(0)
        return cls(len(index_n), float(cost_n.sum()), float(cost_n.max()))

    @classmethod
    def of_shards(cls, notes: Iterable[Mapping[str, Any]]) -> Cost:
        """Return the cost of all shards; shards of an earlier version have none."""
        return sum((cls(**note["cost"]) for note in notes if "cost" in note), Cost())

    @property
    def mean(self) -> float:
        """The mean over the sampled tokens."""
        return self.total / max(1, self.tokens)

    def __str__(self) -> str:
        return (
            f"{self.mean:.4f} of acceptance (mean of {self.tokens:,} sampled tokens; the worst token {self.worst:.3f})"
        )


def split_rows(array: Any, lengths: Iterable[int]) -> list[Any]:
    """Return the rows of each record of an array."""
    return np.split(array, np.cumsum(list(lengths))[:-1])
