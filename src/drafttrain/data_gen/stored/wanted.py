"""Which of the target's outputs are stored, how large they are, and how a batch carries them.

B = sequences, T = positions, R = B * T, N = rows, V = vocabulary, D = hidden, K = tokens of a top-k row
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.core.eight_bit import stored_width
from drafttrain.core.target_rows import TargetNeeds, TargetOutput, TargetRows
from drafttrain.target_model import Target
from drafttrain.target_model.logits import LiveRows, SummedRows

SUMS = ("likeliest", "log_total")
"""Arrays that `target_sums` adds to stored final states."""


@dataclass(frozen=True)
class Wanted:
    """Which target outputs are stored."""

    distribution: Literal["states", "full", "top_k"] | None
    """How the target's distribution is stored; None: it is not needed."""
    states: TargetNeeds
    """Hidden states that are stored."""
    top_k: int
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    """Type of stored states."""

    @classmethod
    def of(cls, data: Any, *, distribution: bool, needs: TargetNeeds) -> Wanted | None:
        """Return what a `DataSettings` stores for a training; None: nothing.

        Args:
            distribution: The target's distribution is needed.
            needs: States that the drafter reads.
        """
        if data.cache == "none" or not (distribution or needs != TargetNeeds()):
            return None
        return cls(data.cache if distribution else None, needs, data.cache_top_k, data.cache_dtype)

    @property
    def final(self) -> bool:
        """Whether the final state is stored: for itself, or because the distribution is computed from it."""
        return self.states.final or self.distribution == "states"

    @property
    def arrays(self) -> list[str]:
        """Names of the stored arrays."""
        rows = {"full": ["logits"], "top_k": ["ids", "log_probs", "tail"]}.get(self.distribution or "", [])
        return [*rows, *(f"hidden_{index}" for index in self.states.hidden), *(["final"] if self.final else [])]

    def bytes_a_row(self, target: Target) -> int:
        """Return the bytes stored for one token."""
        return sum(row.nbytes for row in self.empty((), target).values())

    def empty(self, shape: tuple[int, ...], target: Target, *, summed: bool = False) -> dict[str, Tensor]:
        """Return the arrays of tokens that are laid out in this shape, with any content.

        Args:
            summed: With the sums over the target's vocabulary.
        """
        width = int(target.model.get_output_embeddings().weight.shape[1])
        count = min(self.top_k, target.num_tokens)
        of_rows: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "logits": ((target.num_tokens,), torch.float32),
            "ids": ((count,), torch.int32),
            "log_probs": ((count,), torch.float32),
            "tail": ((), torch.float32),
            "likeliest": ((), torch.int32),
            "log_total": ((), torch.float32),
        }
        columns = stored_width(width) if self.dtype == "int8" else width
        state: tuple[tuple[int, ...], torch.dtype] = ((columns,), getattr(torch, self.dtype))
        kinds = {name: of_rows.get(name, state) for name in [*self.arrays, *(SUMS if summed else ())]}
        return {name: torch.empty((*shape, *size), dtype=dtype) for name, (size, dtype) in kinds.items()}

    def __str__(self) -> str:
        distribution = [f"distribution ({self.distribution})"] if self.distribution else []
        hidden = [f"hidden state {index}" for index in self.states.hidden]
        return ", ".join([*distribution, *hidden, *(["final state"] if self.final else [])])


@dataclass(frozen=True)
class FullRows:
    """Stored logits of the target at every position."""

    logits_RV: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> FullRows:
        """Return a copy with `change` applied to every tensor."""
        return FullRows(change(self.logits_RV))

    def at(self, index_N: Tensor) -> Tensor:
        """Return logits_NV of the token after each flat position."""
        return self.logits_RV[index_N]


@dataclass(frozen=True)
class TopRows:
    """The largest log-probabilities of the target at every position; the rest is spread evenly over the other tokens."""

    ids_RK: Tensor
    log_probs_RK: Tensor
    tail_R: Tensor
    num_tokens: int

    def each(self, change: Callable[[Tensor], Tensor]) -> TopRows:
        """Return a copy with `change` applied to every tensor."""
        return TopRows(change(self.ids_RK), change(self.log_probs_RK), change(self.tail_R), self.num_tokens)

    def at(self, index_N: Tensor) -> Tensor:
        """Return log-probabilities of the token after each flat position."""
        ids_NK = self.ids_RK[index_N].long()
        others = self.num_tokens - ids_NK.shape[1]
        tail_N = self.tail_R[index_N].clamp_min(1e-30)
        fill_NV = (tail_N / max(1, others)).log()[:, None].expand(-1, self.num_tokens)
        return fill_NV.scatter(1, ids_NK, self.log_probs_RK[index_N])


def with_arrays(
    batch: DraftBatch, arrays: Mapping[str, Tensor], wanted: Wanted, model: Any, *, num_tokens: int
) -> DraftBatch:
    """Return a batch with stored outputs of the target; `DraftBatch.restored` turns states in eight bits into numbers.

    Args:
        arrays: By name, laid out like the batch, in their stored types.
        model: The target's, whose head computes the distribution of stored final states.
        num_tokens: Ids of a distribution.
    """
    target = TargetOutput(
        hidden_BTD={index: arrays[f"hidden_{index}"] for index in wanted.states.hidden},
        final_BTD=arrays["final"] if wanted.states.final else None,
    )
    if wanted.distribution is None:
        return replace(batch, target=target)
    return replace(batch, target=target, target_rows=_rows(arrays, wanted, model, num_tokens))


def _rows(arrays: Mapping[str, Tensor], wanted: Wanted, model: Any, num_tokens: int) -> TargetRows:
    """Return the distribution at every position of a batch: computed by the target's head from final states, or stored itself."""
    if wanted.distribution == "states":
        if not arrays.keys() >= set(SUMS):
            return LiveRows(model, arrays["final"])
        sums = {f"{name}_BT": arrays[name] for name in SUMS}
        return SummedRows(model, arrays["final"], **sums, num_tokens=num_tokens)
    flat = {name: array.flatten(0, 1) for name, array in arrays.items()}
    if wanted.distribution == "full":
        return FullRows(flat["logits"])
    return TopRows(flat["ids"], flat["log_probs"], flat["tail"], num_tokens=num_tokens)
