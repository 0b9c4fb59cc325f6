"""What every drafter offers, and the registry of their kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.flops import BatchShape, Products, matrix, parameters_of
from drafttrain.core.registry import Registry
from drafttrain.core.roles import ForwardListener, Proposer
from drafttrain.core.target_rows import RowsAsked, TargetNeeds
from drafttrain.target_model import Target

drafters = Registry("drafter", "drafttrain.drafters")


class Drafter(nn.Module, ABC):
    """A module that proposes the target's next tokens; made by `create` or read by `load`."""

    kind: ClassVar[str]
    lag: ClassVar[int]
    """Row t of depth d is the law of token t + d + lag: 0 when the drafter sees the root, 1 when it sees features before it."""
    needs_target: ClassVar[bool] = False
    """It is made from its target and cannot be trained without one."""
    recomputes: ClassVar[bool] = False
    """It has a stack of layers whose activations `recompute_activations` need not keep."""
    compiles: ClassVar[bool] = False
    """It has parts that `compile_with` replaces."""
    draft: str = "sampled"
    """At temperature > 0: `sampled` from its own law, or `greedy`: its argmax, as some engines draft."""
    serving: ClassVar[str] = "No serving engine loads this kind: decode with `drafttrain eval DRAFTER`."
    """What its card says of serving it, beside the commands of the engines that run its kind."""

    @classmethod
    @abstractmethod
    def create(cls, settings: Any, *, target: Target | None, tokenizer: Any) -> Drafter:
        """Return the drafter at its start, as its settings say."""

    @classmethod
    def why_whole_target(cls, settings: Any) -> str | None:
        """Return why training by these settings needs the target's blocks themselves, whole; None: what is read of it will do."""
        return None

    @property
    def deepest(self) -> int | None:
        """Draft tokens of a round at most; None: it goes on from its own tokens for as long as it is asked."""
        return None

    def needs(self) -> TargetNeeds:
        """Return what this drafter reads of the target at training time (the loss adds its own)."""
        return TargetNeeds()

    reads_slots: ClassVar[bool] = False
    """Its forward in training computes only what the rows of its loss need."""

    def rows_asked(self) -> Sequence[RowsAsked]:
        """Return which rows training reads: first those of the loss, then those of its own forward.

        They are found before a batch is sent to a device; others are found there, and the host waits.
        """
        return [RowsAsked((1,), self.lag)]

    @property
    def compares_with_target(self) -> bool:
        """It reads the target's distribution in training, whatever its loss reads."""
        return False

    def why_not_cached(self) -> str | None:
        """Return why what this drafter reads of the target cannot be stored before training; None: it can."""
        return "it reads the target's logits of every token" if self.needs().logits else None

    def fit_vocabulary(self, label_counts: Callable[[], Any]) -> None:
        """Choose the tokens that this drafter can say, before its start is written; most kinds have the target's own.

        Args:
            label_counts: Computes how often each token id is a label in training.
        """

    @abstractmethod
    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the states of every depth."""

    @abstractmethod
    def proposer(self, target: Target, listener: ForwardListener | None = None) -> Proposer:
        """Return the drafter at inference, for this target."""

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the matrix products of a training step of this kind, its head included, as `core.flops` counts them.

        By default every matrix is read at every position.
        """
        yield matrix(parameters_of(self), shape.positions, gradients=2)

    def recompute_activations(self) -> None:
        """Compute activations again in the backward pass from now on, instead of keeping them."""
        raise NotImplementedError(f"{self.kind}: recomputes is False")

    def compile_with(self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put compiled functions in place of those that take most of a training step; no weight gets another name."""
        raise NotImplementedError(f"{self.kind}: compiles is False")

    def lr_factor(self, name: str) -> float:
        """Return what the learning rate is multiplied by for the parameter of this name."""
        return 1.0

    def adapted(self, target: Target) -> Target:
        """Return the target that the exported drafter stands on: the given one, or a copy with what was trained on top of it."""
        return target

    def standing_on(self, target: Target) -> AbstractContextManager[None]:
        """Make `target` the one that the drafter in training stands on, for the calls inside."""
        return nullcontext()

    def calibrate(self, target: Target, batches: Iterable[DraftBatch]) -> Mapping[str, Any]:
        """Return what is fitted on held-out text of the target after training: JSON files of the drafter folder, by name."""
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, target: Target, dtype: Any = None) -> Drafter:
        """Read what `save` wrote."""
