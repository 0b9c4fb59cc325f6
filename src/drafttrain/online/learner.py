"""The update: optimizer steps of a drafter on requests from the buffer, with the loss at refused positions or at all labels.

B = sequences, T = positions, N = trained positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from drafttrain.core.batches import DraftBatch
from drafttrain.core.texts import Record
from drafttrain.data_gen.packing import pack
from drafttrain.data_gen.stored.logged_distribution import with_logged
from drafttrain.drafters import Drafter
from drafttrain.losses import Loss
from drafttrain.losses.step import batch_loss, share_of_step
from drafttrain.target_model import Target
from drafttrain.training.optimizer import build_optimizer
from drafttrain.training.precision import float32_products, training_autocast
from drafttrain.training.settings import TrainSettings
from drafttrain.training.target_outputs import missing, with_target


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step."""

    loss: float
    """Mean over the positions."""
    positions: int
    skipped: bool
    """The gradient was not finite, so no parameter changed."""


def refused_labels_only(record: Record) -> Record:
    """Return the record with labels at its refused positions only.

    The label is the token that replaced the draft token. The row that predicted it is one position earlier; only `losses.align` shifts.
    """
    refused = set(record.refused or ())
    return replace(record, loss_mask=[i in refused for i in range(len(record.tokens))])


class Learner:
    """A drafter in training and its optimizer. The learning rate is constant after the warm-up, because traffic has no end."""

    def __init__(
        self, drafter: Drafter, loss: Loss, *, target: Target, settings: TrainSettings, max_length: int, num_tokens: int
    ) -> None:
        if settings.activation_checkpointing:
            drafter.recompute_activations()
        self.drafter = drafter
        self.loss = loss
        self.target = target
        self.settings = settings.on(target.device.type)
        self.max_length = max_length
        self.num_tokens = num_tokens
        self.steps = 0
        self.optimizer = build_optimizer(drafter, settings, lr_factor=drafter.lr_factor)

    def step(self, records: Sequence[Record], *, positions: str) -> Step:
        """Take one optimizer step on some requests.

        Args:
            positions: `refused`: the loss is taken at `Record.refused`; `all`: at all labels.
        """
        batch = self._batch(records, positions=positions)
        self.drafter.train()
        self.optimizer.zero_grad()
        device = self.target.device
        with float32_products(self.settings, device):
            with training_autocast(self.settings, device):
                made = batch_loss(
                    self.drafter,
                    self.loss,
                    batch,
                    vocab_size=self.num_tokens,
                    chunk_rows=self.settings.loss_chunk_rows,
                )
            share_of_step(made.total, batch, world_size=1, accumulation=1).backward()
        skipped = not self._clip_gradient()
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * self._warm_up()
            self.optimizer.step()
        self.loss.end_of_step()
        self.steps += 1
        self.drafter.eval()
        return Step(float(made.total.detach()) / max(1, len(made.loss_N)), len(made.loss_N), skipped)

    def _batch(self, records: Sequence[Record], *, positions: str) -> DraftBatch:
        labelled = [refused_labels_only(record) if positions == "refused" else record for record in records]
        weight = float(max(1, sum(sum(record.loss_mask[1:]) for record in labelled)))
        batch, places = pack(labelled, width=self.max_length, weight_of_step=weight, step=self.steps)
        logged = [record.logged for record in records]
        if all(one is not None for one in logged):
            # The target's distribution is logged at all labels, so it is at the refused ones too.
            batch = with_logged(batch, places, records, [one for one in logged if one], num_tokens=self.num_tokens)
        batch = batch.to(self.target.device)
        unread = missing(self.drafter, self.loss, batch)
        return batch if unread is None else with_target(batch, self.target, unread, self.loss)

    def _clip_gradient(self) -> bool:
        """Clip the gradient and return whether it is finite."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm or float("inf"))
        return bool(torch.isfinite(norm))

    def _warm_up(self) -> float:
        return min(1.0, (self.steps + 1) / (self.settings.warmup_steps + 1))

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`."""
        trained = {name for name, p in self.drafter.named_parameters() if p.requires_grad}
        return {
            "drafter": {name: value for name, value in self.drafter.state_dict().items() if name in trained},
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.drafter.load_state_dict(state["drafter"], strict=False)
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
