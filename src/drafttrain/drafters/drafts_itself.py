"""A tuned target that drafts for itself: what kinds share that train on altered texts and read drafts off the verifying call.

B = sequences, T = positions, N = slots, V = vocabulary, D = hidden
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.core.altered_text import AlteredText
from drafttrain.core.batches import DraftBatch, DraftOutput
from drafttrain.core.errors import CheckpointError
from drafttrain.core.files import write_json
from drafttrain.core.flops import BatchShape, Products, matrix
from drafttrain.core.settings import setting
from drafttrain.drafters.drafter import Drafter
from drafttrain.drafters.tuned_target import TunedTarget, TuningSettings
from drafttrain.target_model import Target
from drafttrain.target_model.matrix_products import head_parameters


@dataclass(kw_only=True)
class DraftsItselfSettings:
    """Settings of these kinds."""

    tune: TuningSettings = setting(TuningSettings(), help="How the target is tuned.")


class DraftsItself(Drafter):
    """The target, tuned. Lag 0: depth 1 is its own distribution, which the recipe's loss trains on the texts as they are.

    In training a second forward reads the altered texts; `loss_of_altered` is added to the recipe's loss times `text_weight`.
    """

    lag = 0
    needs_target = True
    drafts_trees = False
    text_weight: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weights: Any = None
        """Those of `tuned`, in training."""

    def tune(self, target: Target | None, settings: DraftsItselfSettings) -> None:
        """Train the target from now on.

        Raises:
            CheckpointError: There is none, or it cannot be tuned so.
        """
        if target is None:
            raise CheckpointError(f"drafter.kind is '{self.kind}' but target.model is null: the target itself is tuned")
        self.tuned = TunedTarget(target, settings.tune.lora, key="drafter.tune.lora")
        self.weights = self.tuned.weights

    @classmethod
    def tuned_by(cls, settings: DraftsItselfSettings) -> str | None:
        """Return the key of the tuning."""
        return "tune"

    @property
    def replayable(self) -> bool:
        """Its drafts are read off calls that no forward repeats."""
        return False

    @property
    def device(self) -> torch.device:
        """Where its weights are; a loaded one has none."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def in_training(self) -> TunedTarget:
        """The target in training."""
        assert self.tuned is not None, "only a drafter in training has a forward"
        return self.tuned

    def forward(self, batch: DraftBatch) -> DraftOutput:
        """Return the tuned target's states of the texts, with the loss of the altered ones in training."""
        tuned = self.in_training
        final_BTD, _ = tuned.read(batch)
        drafted = DraftOutput({1: final_BTD}, tuned.head, self.lag)
        if not self.training:
            return drafted
        assert batch.altered is not None, "the run attaches the altered texts"
        altered_BTD, _ = tuned.read(replace(batch, tokens_BT=batch.altered.tokens_BT))
        extra_loss = self.loss_of_altered(final_BTD, altered_BTD, batch.tokens_BT, batch.altered)
        return replace(drafted, depth_weights={1: self.text_weight}, extra_loss=extra_loss)

    @abstractmethod
    def loss_of_altered(
        self, final_BTD: Tensor, altered_BTD: Tensor, tokens_BT: Tensor, altered: AlteredText
    ) -> Tensor:
        """Return the weighted sum of the losses of the altered slots.

        Args:
            final_BTD: States of the texts as they are.
            altered_BTD: States of the altered texts.
            tokens_BT: The texts as they are.
        """

    def logits_at(self, states_BTD: Tensor, slots_N: Tensor) -> Tensor:
        """Return logits_NV of the tuned target after these slots, float32 or wider."""
        logits_NV = self.in_training.head(states_BTD.flatten(0, 1).index_select(0, slots_N), 1)
        kept_NV = logits_NV[:, : self.in_training.target.num_tokens]
        return kept_NV.to(torch.promote_types(kept_NV.dtype, torch.float32))

    def products(self, shape: BatchShape) -> Iterator[Products]:
        """Yield the products of two passes through the target, and of its head at the labels."""
        for _ in range(2):
            yield from self.in_training.products(shape)
        yield matrix(head_parameters(self.in_training.target.model), shape.rows(1), gradients=1)

    def save(self, folder: Path) -> None:
        """Write the tuning, its numbers, and the weights beside those of the target: of some kinds there are none."""
        write_json(folder / "config.json", {"model_type": self.kind, **self.numbers()})
        own = {
            name: tensor.detach().contiguous().cpu()
            for name, tensor in self.state_dict().items()
            if not name.startswith("weights.")
        }
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        self.in_training.save(folder)

    @abstractmethod
    def numbers(self) -> Mapping[str, Any]:
        """Return what config.json stores beside the kind."""
