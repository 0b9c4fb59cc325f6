"""The nested causal LM: the first neurons of its feed-forward blocks are a smaller model with the same attention, embedding and head.

B = sequences, T = positions, D = hidden
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import Tensor

from drafttrain.core.batches import Beside, DraftBatch, DraftOutput
from drafttrain.core.flops import BatchShape, Products, matrix
from drafttrain.core.settings import setting
from drafttrain.drafters import drafters
from drafttrain.drafters.causal_lm.module import CausalLMDrafter, CausalLMSettings
from drafttrain.drafters.causal_lm.scratch import default_width
from drafttrain.drafters.recomputing import run_part
from drafttrain.losses.forward_kl import ForwardKL, ForwardKLSettings
from drafttrain.target_model import Target
from drafttrain.target_model.anatomy import blocks
from drafttrain.target_model.first_neurons import (
    check_gated,
    gated_mlps,
    neurons_at,
    neurons_left_out,
    share_problem,
    with_first_neurons,
)
from drafttrain.target_model.logits import LiveRows


@dataclass
class MatFormerSettings(CausalLMSettings):
    """A separate causal LM that is trained with several feed-forward widths, each nested in the next."""

    widths: list[float] = setting(
        [0.25, 0.5],
        help="Shares of the feed-forward neurons of the sub-models, ascending, below 1; the whole model is one more.",
        gt=0,
        lt=1,
    )
    one_a_step: bool = setting(
        False, help="Train one width a step, drawn by its number; false: all of them in every step, their losses added."
    )
    distill: float = setting(
        0.0,
        help="Weight of KL(whole model || sub-model), beside the loss of each sub-model; not with one_a_step.",
        ge=0,
    )

    def check(self) -> list[str]:
        """Return what is wrong across fields."""
        problems = super().check()
        if not self.widths or self.widths != sorted(set(self.widths)):
            problems.append(f"widths: at least one share, ascending, each once, got {self.widths}")
        if self.one_a_step and self.distill:
            problems.append(
                f"distill: the whole model does not run in every step with one_a_step: set 0, got {self.distill:g}"
            )
        width = (
            (self.intermediate_size or default_width(self.hidden_size))
            if self.init == "scratch"
            else self.intermediate_size
        )
        if width is not None and self.init != "checkpoint":
            found = [share_problem(share, width) for share in self.widths]
            problems += [f"widths: {problem}" for problem in found if problem is not None]
        if self.tokenizer is not None:
            problems.append("tokenizer: a matformer has the target's: remove it, or use kind causal_lm")
        if self.lora is not None:
            problems.append(
                "lora: neurons of a matformer are trained by their own weights: remove it, or use kind causal_lm"
            )
        return problems


@drafters.register("matformer", MatFormerSettings)
class MatFormerDrafter(CausalLMDrafter):
    """A causal LM that is trained at several widths. Lag 0, depth 1. It drafts as a whole; `drafttrain extract` writes sub-models.

    Source: Devvrit et al. 2023, MatFormer, arXiv 2310.07707.
    """

    kind = "matformer"
    trains_partitioned: ClassVar[bool] = False
    serving: ClassVar[str] = """\
The folder is a plain language model. `drafttrain extract DRAFTER OUT --ffn M` writes a sub-model as a drafter of kind causal_lm,
which engines load beside the whole one."""

    shares: tuple[float, ...] = ()
    """Of the neurons of the sub-models."""
    one_a_step: bool = False
    distill: float = 0.0
    _now: Sequence[int] | None = None
    """By block, the neurons that run; None: all."""

    def train_with(self, settings: Any, *, target: Target | None, tokenizer: Any) -> None:
        """Train the widths of the settings, besides what every causal LM does."""
        super().train_with(settings, target=target, tokenizer=tokenizer)
        self.shares, self.one_a_step, self.distill = tuple(settings.widths), settings.one_a_step, settings.distill
        mlps = gated_mlps(self.model)
        for share in self.shares:
            neurons_at(mlps, share)

    @classmethod
    def create(cls, settings: Any, *, target: Target | None, tokenizer: Any) -> Self:
        """Return the drafter as training starts from it."""
        drafter = super().create(settings, target=target, tokenizer=tokenizer)
        check_gated(drafter.model)
        return drafter

    @property
    def _mlps(self) -> list[Any]:
        return [block.mlp for block in blocks(self.model)]

    def narrowed(self, widths: Sequence[int]) -> AbstractContextManager[None]:
        """Within this context each block runs its first neurons, so many of them (Mix'n'Match where they differ)."""
        return with_first_neurons(self._mlps, widths)

    def recompute_activations(self) -> None:
        """Store only the input of each layer. It runs again in the backward pass with the neurons that it ran with."""
        self.recomputing = True
        for block in blocks(self.model):
            block.__dict__["forward"] = partial(self._recomputed, block.forward)

    def _recomputed(self, forward: Callable[..., Any], *inputs: Tensor, **others: Any) -> Any:
        widths = self._now

        def with_the_same_neurons(*inputs: Tensor, **others: Any) -> Any:
            if widths is None:
                return forward(*inputs, **others)
            with self.narrowed(widths):
                return forward(*inputs, **others)

        return run_part(with_the_same_neurons, *inputs, recompute=True, **others)

    def _of_target_ids(self, batch: DraftBatch) -> DraftOutput:
        # Validation is of the whole model.
        if not self.training:
            return self._of_share(1.0, batch)
        if self.one_a_step:
            return self._of_share(random.Random(batch.step).choice([*self.shares, 1.0]), batch)
        whole = self._of_share(1.0, batch)
        parts = [self._of_share(share, batch) for share in self.shares]
        beside = [Beside(part, None, batch.target_rows) for part in parts]
        if self.distill:
            rows = LiveRows(self.model, whole.states_BTD[1].detach())
            weighted = [replace(part, depth_weights={1: self.distill}) for part in parts]
            beside += [Beside(part, ForwardKL(ForwardKLSettings()), rows) for part in weighted]
        return replace(whole, beside=tuple(beside))

    def _of_share(self, share: float, batch: DraftBatch) -> DraftOutput:
        if share == 1:
            return super()._of_target_ids(batch)
        self._now = neurons_at(self._mlps, share)
        try:
            with self.narrowed(self._now):
                return super()._of_target_ids(batch)
        finally:
            self._now = None

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of the whole model, and of each sub-model; with one width a step those of a mean step."""
        own = list(super().products(shape))
        each_step = len(self.shares) + 1 if self.one_a_step else 1
        for share in (*self.shares, 1.0):
            left_out = neurons_left_out(self._mlps, neurons_at(self._mlps, share)).multiplications
            for one in (*own, matrix(-left_out, shape.positions, gradients=2)):
                yield replace(one, multiplications=one.multiplications // each_step)
