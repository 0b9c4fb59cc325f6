"""Heads, one file a kind: small modules that score one draft token from one hidden state of a frozen model.

N = rows (draft tokens), D = hidden
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.core.errors import CheckpointError
from drafttrain.core.foreign import read_json
from drafttrain.core.registry import Registry
from drafttrain.core.tensors import load_into
from drafttrain.target_model import Target
from drafttrain.target_model.folders import fingerprint_of

heads = Registry("head", "drafttrain.heads")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


class HeadSettings:
    """What the settings of every head offer."""

    drafter: str
    """Folder or hub id of the frozen drafter whose tokens are labelled, or recipe:NAME."""

    @property
    def layer(self) -> int:
        """State of the target that is stored beside each draft token; -1: after the last block, before the final norm."""
        return -1


@dataclass(frozen=True)
class HeadRows:
    """Labelled draft tokens: what the frozen model held of each, and how much it deserved to be kept, 0..1."""

    features_ND: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class HeadBatch:
    """A micro-batch of labelled draft tokens."""

    rows: HeadRows
    weight_of_step: float
    """Sum of the rows' weights over all micro-batches of this optimizer step on all ranks."""
    step: int = 0

    @property
    def num_tokens(self) -> int:
        """Draft tokens in it."""
        return len(self.rows)

    def each(self, change: Callable[[Tensor], Tensor]) -> HeadBatch:
        """Return the batch of changed tensors: moved, pinned."""
        return replace(self, rows=HeadRows(change(self.rows.features_ND), change(self.rows.labels_N)))

    def to(self, device: Any) -> HeadBatch:
        """Return the batch on `device`."""
        return self.each(lambda tensor: tensor.to(device))


class TokenHead(nn.Module, ABC):
    """Scores draft tokens: a logit each, large where the token deserves to be kept. Knows nothing of the model it reads."""

    kind: ClassVar[str]

    def __init__(self, settings: Any, hidden_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.hidden_size = hidden_size

    @abstractmethod
    def forward(self, features_ND: Tensor) -> Tensor:
        """Return the logit of each row, float32."""

    @abstractmethod
    def loss(self, scores_N: Tensor, labels_N: Tensor) -> Tensor:
        """Return the loss of each row, float32, unreduced; the trainer divides its sum by the sum of `weights`."""

    @abstractmethod
    def weights(self, labels_N: Tensor) -> Tensor:
        """Return what each row counts in the mean."""

    def probability(self, features_ND: Tensor) -> Tensor:
        """Return the calibrated chance of each row."""
        return self(features_ND).float().sigmoid()

    def uncorrected(self, features_ND: Tensor) -> Tensor | None:
        """Return the chance of each row before the head corrects it; None: it corrects nothing."""
        return None

    def lr_factor(self, name: str) -> float:
        """Return what the learning rate is multiplied by for the parameter of this name."""
        return 1.0

    def finish(self, held_out: HeadRows) -> None:
        """Set what is chosen on held-out tokens once the weights are trained."""

    def save(self, folder: Path, made_for: MadeFor | None = None) -> None:
        """Write config.json and model.safetensors."""
        config = {"kind": self.kind, "hidden_size": self.hidden_size, "settings": asdict(self.settings)}
        if made_for is not None:
            config["made_for"] = asdict(made_for)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@dataclass(frozen=True)
class MadeFor:
    """The frozen models that a head was trained on."""

    target: str
    target_fingerprint: str
    drafter: str
    drafter_fingerprint: str


@dataclass(frozen=True)
class LoadedHead:
    """A head read from its folder, and what it was made for."""

    head: TokenHead
    made_for: MadeFor | None


def load_head(folder: Path, *, kind: str) -> LoadedHead:
    """Read what `TokenHead.save` wrote.

    Raises:
        CheckpointError: The folder is missing or damaged, or holds a head of another kind.
    """
    config = _config(folder)
    if config["kind"] != kind:
        raise CheckpointError(f"{folder}: holds a head of kind {config['kind']!r}, {kind!r} is needed here")
    entry = heads.entry(kind)
    head: TokenHead = entry.component(entry.settings(**config["settings"]), config["hidden_size"])
    load_into(head, folder / WEIGHTS)
    return LoadedHead(head.eval().requires_grad_(False), config["made_for"])


def check_made_for(folder: Path, *, target: Target, drafter: Path) -> None:
    """Refuse a head that was trained on other frozen models than these: its chances mean nothing of them.

    A head that does not say what it was made for passes.

    Raises:
        CheckpointError: Naming every model that is another.
    """
    made: MadeFor | None = _config(folder)["made_for"]
    if made is None:
        return
    others = []
    if made.target_fingerprint != target.fingerprint:
        others.append(f"the target {made.target} ({made.target_fingerprint}), not {target.name} ({target.fingerprint})")
    if made.drafter_fingerprint != (found := fingerprint_of(drafter)):
        others.append(f"the drafter {made.drafter} ({made.drafter_fingerprint}), not {drafter} ({found})")
    if others:
        raise CheckpointError(
            f"{folder}: this head was made for {' and '.join(others)}. Train a head for these models, or pass those that it "
            "was made for."
        )


def _config(folder: Path) -> dict[str, Any]:
    """Return kind, settings, hidden_size and made_for as the folder of a head says them."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG} here: not the folder of a head")
    try:
        config = read_json(path)
        return {
            "kind": config["kind"],
            "settings": config["settings"],
            "hidden_size": int(config["hidden_size"]),
            "made_for": MadeFor(**config["made_for"]) if "made_for" in config else None,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the configuration of a head: {error!r}") from error


@torch.no_grad()
def probabilities(head: TokenHead, rows: HeadRows, *, rows_at_once: int = 8192) -> Tensor:
    """Return the head's chance of every row, on the CPU; the rows go to the head's device a part at a time."""
    device = next(head.parameters()).device
    parts = [head.probability(part.to(device)).cpu() for part in rows.features_ND.split(rows_at_once)]
    return torch.cat(parts) if parts else torch.zeros(0)
