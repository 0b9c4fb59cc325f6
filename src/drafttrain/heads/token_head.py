"""Base class of all heads, and the registry of their kinds.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.registry import Registry
from drafttrain.heads.rows import HeadRows

heads = Registry("head", "drafttrain.heads")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class MadeFor:
    """The frozen models that a head was trained on."""

    target: str
    target_fingerprint: str
    drafter: str
    drafter_fingerprint: str


class HeadSettings:
    """Base class of the settings of all heads."""

    drafter: str
    """Folder or hub id of the frozen drafter whose tokens are labelled, or recipe:NAME."""

    @property
    def layer(self) -> int:
        """State of the target that is stored with each draft token; -1: after the last block, before the final norm."""
        return -1


class TokenHead(nn.Module, ABC):
    """A small module that scores draft tokens from hidden states of a frozen model; it does not depend on that model."""

    kind: ClassVar[str]

    def __init__(self, settings: Any, hidden_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_size = hidden_size

    @abstractmethod
    def forward(self, features_ND: Tensor) -> Tensor:
        """Return one logit for each row, float32: large where the token should be accepted."""

    @abstractmethod
    def loss(self, scores_N: Tensor, labels_N: Tensor) -> Tensor:
        """Return the loss of each row, float32, unreduced; the trainer divides its sum by the sum of `weights`."""

    @abstractmethod
    def weights(self, labels_N: Tensor) -> Tensor:
        """Return the weight of each row in the mean."""

    def probability(self, features_ND: Tensor) -> Tensor:
        """Return the calibrated probability of each row."""
        return self(features_ND).float().sigmoid()

    def uncorrected(self, features_ND: Tensor) -> Tensor | None:
        """Return the probability of each row before the correction; None: the head has no correction."""
        return None

    def lr_factor(self, name: str) -> float:
        """Return the factor on the learning rate for the parameter of this name."""
        return 1.0

    def finish(self, held_out: HeadRows) -> None:
        """Choose what depends on held-out tokens, such as a threshold, after the training."""

    def save(self, folder: Path, made_for: MadeFor | None = None) -> None:
        """Write config.json and model.safetensors."""
        config = {"kind": self.kind, "hidden_size": self.hidden_size, "settings": asdict(self.settings)}
        if made_for is not None:
            config["made_for"] = asdict(made_for)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def probabilities(head: TokenHead, rows: HeadRows, *, rows_at_once: int = 8192) -> Tensor:
    """Return the probability of every row, on the CPU; rows are moved to the head's device in parts."""
    device = next(head.parameters()).device
    parts = [head.probability(part.to(device)).cpu() for part in rows.features_ND.split(rows_at_once)]
    return torch.cat(parts) if parts else torch.zeros(0)
